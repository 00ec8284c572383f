"""Pretrained feature extractors: functions that build a ``Backbone`` of five stages."""
