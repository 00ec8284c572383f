"""Test a finished run again: with more episodes, other seeds, or another number of shots.

python evaluate.py run=runs/emoji-baseline-efficientnet_lite0-svf-fold0-shot1-seed0
python evaluate.py run=runs/... shot=5 episodes=5000 seeds=[0,1,2,3,4]
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from svf_lightning.errors import one_line_errors


@one_line_errors  # for Hydra's errors
@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="evaluate")
@one_line_errors  # for ours, before Hydra adds lines of its own
def main(cfg: DictConfig) -> float:
    """Test the run's weights once per seed and write evaluation.json beside its metrics.json."""
    from svf_lightning.runs.evaluation import evaluate

    changes = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(changes, dict)
    return evaluate(Path(changes.pop("run")), **changes)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
