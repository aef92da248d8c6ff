"""The conformance suite: the contract of plugins, one check per sentence, on toys that take seconds.

Example::

    from backdoorbench_mcl.testing import parametrize_with_checks
    from bbmcl_smooth.method import Smooth

    @parametrize_with_checks([Smooth(), Smooth(smoothing=0.2)])
    def test_conformance(check):
        check()

or, without pytest, `bbmcl check smooth`. A check is also a function: `check_deterministic(Smooth())` returns None, or
raises `CheckFailed` with what was found, what was expected and what to do. The toys are four classes of noisy colours
in 3x32x32, a network of 3,000 parameters and a victim with a checkerboard of 3x3 pixels planted for label 1; a method
that needs other parameters there than on real data is checked as `SIG(delta=60)`, say.
"""

from __future__ import annotations

from .attacks import (
    check_goal_fits_its_labels,
    check_poison_touches_exactly_rate,
    check_stamp_keeps_dtype_range_and_shape,
    check_state_can_be_stored,
    check_trigger_is_learnable,
)
from .confined import check_runs_confined
from .core import Check, CheckFailed, Skipped, Subject
from .datasets import check_loads_what_it_says, check_splits_are_apart
from .every import (
    check_constructs_without_arguments,
    check_deterministic,
    check_has_a_card,
    check_leaves_global_state_alone,
    check_rebuilds_from_its_spec,
)
from .networks import (
    check_can_be_trained,
    check_embed_and_stages,
    check_normalises_by_itself,
    check_predicts_each_image_by_itself,
    check_state_dict_is_the_network,
)
from .repairs import (
    check_finds_a_planted_patch,
    check_keeps_a_clean_model_clean,
    check_reads_only_what_it_declared,
    check_returns_a_trigger,
    check_returns_a_working_classifier,
    check_survives_a_restart,
    check_survives_one_clean_image,
    check_verdict_covers_every_label,
)
from .suite import CHECKS, checks_for, parametrize_with_checks

__all__ = [
    "CHECKS", "Check", "CheckFailed", "Skipped", "Subject", "check_can_be_trained",
    "check_constructs_without_arguments", "check_deterministic", "check_embed_and_stages",
    "check_finds_a_planted_patch", "check_goal_fits_its_labels", "check_has_a_card", "check_keeps_a_clean_model_clean",
    "check_leaves_global_state_alone", "check_loads_what_it_says", "check_normalises_by_itself",
    "check_poison_touches_exactly_rate", "check_predicts_each_image_by_itself", "check_reads_only_what_it_declared",
    "check_rebuilds_from_its_spec", "check_returns_a_trigger", "check_returns_a_working_classifier",
    "check_runs_confined", "check_splits_are_apart", "check_stamp_keeps_dtype_range_and_shape",
    "check_state_can_be_stored", "check_state_dict_is_the_network", "check_survives_a_restart",
    "check_survives_one_clean_image", "check_trigger_is_learnable", "check_verdict_covers_every_label", "checks_for",
    "parametrize_with_checks",
]  # fmt: skip
