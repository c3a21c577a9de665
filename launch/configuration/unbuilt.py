"""Which keys of a configuration ask for what isn't built, and what to set instead."""

from launch.config import TrainConfig


def refuse_unbuilt(config: TrainConfig) -> list[str]:
    """Keys whose feature isn't built yet (or never will be), each with the reason."""
    refusals = (
        (
            config.compile
            and config.gradient_checkpointing
            and config.parallel.recompute == "selective",
            "parallel.recompute: found selective with compile: true; single operators of compiled "
            "layers can't be kept; allowed with compile: layer, or gradient_checkpointing: false",
        ),
        (
            config.overwrite_run_dir,
            "overwrite_run_dir: found true; it would delete the old run, and nothing is ever "
            "deleted here; allowed: false; name a new run_dir, or put ${time} into it",
        ),
    )
    return [text for refused, text in refusals if refused]
