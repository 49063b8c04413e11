"""The command for rank-k solvers prints and saves what it measured."""

import importlib.metadata

import pytest

from experiments.bench import race, rank_k, topk
from lit_fanions.lmo import singular_triplets
from tests.experiments.bench.outcomes import outcome, refused


def test_ratios_are_quotients_of_medians(topk_outcome):
    for name, k in (("gaussian", 1), ("gaussian", 4), ("power_law", 1), ("power_law", 4)):
        entries = [e for e in topk_outcome.result["results"] if (e["case"], e["k"]) == (name, k)]
        medians = {e["solver"]: e["median_seconds"] for e in entries if e["reached"]}
        theirs = [topk.ARPACK]
        if name == "power_law":
            theirs += [rank_k.FULL, rank_k.LOW_RANK]
        reference = min(medians[solver] for solver in theirs)
        best = min(
            median
            for solver, median in medians.items()
            if solver.startswith("ours: ") and solver != rank_k.AUTO
        )
        for entry in entries:
            ratio, ours = entry["ratio_to_reference"], entry["ratio_to_best_of_ours"]
            if not entry["reached"]:
                assert ratio is None and ours is None
                continue
            assert ratio == pytest.approx(entry["median_seconds"] / reference)
            if entry["solver"].startswith("ours: "):
                assert ours == pytest.approx(entry["median_seconds"] / best)
            else:
                assert ours is None


def test_printed_numbers_are_the_saved_ones(topk_outcome):
    entries = [e for e in topk_outcome.result["results"] if e["case"] == "gaussian"]
    rows = topk_outcome.rows("k  solver")
    for entry, row in zip(entries, rows, strict=True):
        assert row[:2] == [str(entry["k"]), entry["solver"]]
        assert f"{1e3 * entry['median_seconds']:.4g}" in row
        assert f"{entry['error']:.4g}" in row
        if entry["reached"]:
            assert f"{entry['ratio_to_reference']:.4g}" in row
    # Beside ours the paper's seconds, and their ratio to its fastest.
    assert rows[0][-2:] == ["0.18", "1"]
    assert next(row for row in rows if row[1] == topk.PCA)[-2:] == ["1.15", "6.389"]
    assert "recorded momentum: left out" in topk_outcome.printed
    for name in ("scipy", "numpy"):
        version = importlib.metadata.version(name)
        assert topk_outcome.result["versions"][name] == version
        assert f"{name} {version}" in topk_outcome.printed
    condition, choice = singular_triplets.rules()[-1]
    assert topk_outcome.printed.splitlines()[-1].split("  ")[0] == condition
    assert topk_outcome.printed.rstrip().endswith(choice)


def test_solvers_that_miss_the_error_are_listed(tmp_path):
    args = ["topk", "--cases", "gaussian", "--k", "2", "--repeats", "1", "--error", "1e-7"]
    found = outcome(tmp_path, *args)
    entries = {e["solver"]: e for e in found.result["results"]}
    lanczos = entries["ours: lanczos"]
    assert not lanczos["reached"]
    assert lanczos["error"] > 1e-7
    assert lanczos["median_seconds"] > 0
    assert lanczos["ratio_to_reference"] is None
    (row,) = (row for row in found.rows("k  solver") if row[1] == "ours: lanczos")
    assert "not reached" in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "--size: '0' is no whole number of at least 1"),
        (["--k", "0"], "--k: '0' is no whole number of at least 1"),
        (["--k", "all"], "--k: 'all' is no whole number of at least 1"),
        (["--k", "4", "96"], "k = 96 is too large for Gaussian 96x96"),
        (["--size", "3"], "k = 4 is too large for Gaussian 3x3, as in Table 2 of the paper: give"),
        (["--cases", "paper"], "invalid choice: 'paper'"),
        (["--cases", "momentum"], "--cases momentum needs --checkpoints"),
        (["--error", "nan"], "--error: 'nan' is no number above 0"),
        (["--budget", "-1"], "--budget: '-1' is no number above 0"),
    ],
)
def test_topk_refuses_impossible_options(options, message, capfd):
    assert message in refused(capfd, "topk", "--quick", *options)


def test_auto_is_compared_with_the_best_of_our_other_solvers(tmp_path, monkeypatch):
    canned = {rank_k.AUTO: 1.0, "ours: lanczos": 2.0, "ours: exact": 4.0}

    def take_turns(competitors, **options):
        return {name: [canned.get(name, 8.0)] for name in competitors}

    monkeypatch.setattr(race, "take_turns", take_turns)
    found = outcome(tmp_path, "topk", "--cases", "gaussian", "--k", "1", "--repeats", "1")
    ratios = {e["solver"]: e["ratio_to_best_of_ours"] for e in found.result["results"]}
    assert [ratios[name] for name in canned] == [0.5, 1, 2]
    assert ratios[topk.ARPACK] is None


def test_all_tried_settings_are_saved(topk_outcome):
    entry = next(e for e in topk_outcome.result["results"] if e["solver"] == topk.PCA)
    assert [t["seed"] for t in entry["tried"] if t["setting"] == entry["setting"]] == list(range(5))
    assert max(t["error"] for t in entry["tried"] if t["setting"] == entry["setting"]) <= 0.01
    assert entry["tried"][0]["setting"] != entry["setting"]
    assert entry["tried"][0]["error"] > 0.01
