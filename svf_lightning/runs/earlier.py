"""Runs of earlier versions: what their files call otherwise, in today's words."""

from typing import Any

# Modules that have moved, by their old place in the package.
MOVED = {
    "segmenter": "training.segmenter",
    "losses": "training.losses",
    "callbacks": "training.callbacks",
    "base_learner": "training.base_learner",
}


def update(config: dict[str, Any]) -> dict[str, Any]:
    """Bring the configuration of a run up to date; one of today is left as it is."""
    config = _moved(config)
    model = config.get("model", {})
    network = model.get("network", {})
    if network.pop("_partial_", False):
        network["backbone"] = config["backbone"]  # was handed over in Python
    if "apart" in model:
        model["separate"] = model.pop("apart")
    config.get("trainer", {}).setdefault("default_root_dir", config.get("run_dir"))
    return config


def _moved(node: Any) -> Any:
    if isinstance(node, list):
        return [_moved(item) for item in node]
    if isinstance(node, dict):
        return {key: _target(value) if key == "_target_" else _moved(value) for key, value in node.items()}
    return node


def _target(name: Any) -> Any:
    package, _, rest = str(name).partition(".")
    module, _, attribute = rest.partition(".")
    return (
        f"{package}.{MOVED[module]}.{attribute}" if package == "svf_lightning" and module in MOVED else name
    )
