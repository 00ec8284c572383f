"""Tables and figures made from what runs leave behind; nothing here computes a score."""
