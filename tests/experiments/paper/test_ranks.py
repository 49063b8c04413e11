"""The variants of the command ranks, and its verdicts on last losses."""

from pathlib import Path

import pytest
import yaml

from experiments.paper import ranks, tuning
from lit_fanions.cli.console import Refused


def test_variants_have_every_rank_with_and_without_feedback(tmp_path):
    path = tmp_path / "fanion.yaml"
    content = {"model": {"init_args": {"optimizer": {"matrix": {"lr": 0.01}}}}}
    path.write_text(yaml.safe_dump(content))
    variants = ranks.make_variants({"fanion": path})
    assert len(variants) == 2 * 6 + 2
    # A step of rank 4 is four times shorter than one of rank 64.
    assert variants["fanion-4"].lr == pytest.approx(4 * variants["fanion-64"].lr)
    assert f"{ranks._MATRIX}.error_feedback=true" in variants["fanion-4-feedback"].args
    with pytest.raises(Refused, match="give one recipe, not 2"):
        ranks.make_variants({"a": Path("a"), "b": Path("b")})


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.1, "confirmed"), (0.001, "refuted"), (-0.1, "refuted")]
)
def test_error_feedback_is_judged_for_f_neon_and_for_the_others(gain, verdict):
    finals = {
        "f_fanion-1": {0: 2.001, 1: 2.0, 2: 1.999},
        "f_fanion-1-feedback": dict.fromkeys(range(3), 2 - gain),
    }
    neon, others = ranks.judge_all(finals, "data")
    assert neon.id == others.id == "error-feedback"
    assert (neon.verdict, neon.n, neon.data) == (verdict, 3, "data, F-Neon")
    assert (others.verdict, others.rule) == ("not testable here", tuning.NO_BEST)
    finals = {name.replace("-1", "-16"): values for name, values in finals.items()}
    neon, others = ranks.judge_all({**finals, "fanion-1": {0: 1.0}}, "data")
    assert (neon.verdict, others.verdict) == ("not testable here", verdict)
    assert others.found.count("±") == 1
