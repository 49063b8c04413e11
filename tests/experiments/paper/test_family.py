"""The variants of the command family."""

from pathlib import Path

import pytest
import yaml

from experiments.paper import family
from experiments.paper.repetitions import check
from lit_fanions.cli.console import Refused


def recipes(*names):
    return {name: Path(f"configs/nanogpt/{name}.yaml") for name in names}


def test_every_variant_is_a_recipe_that_fit_takes():
    names = {Path(path).stem for path in family.COMPARISON.recipes}
    variants = family.make_variants(recipes(*names, "quickstart"))
    assert variants.keys() == family.VARIANTS.keys()
    for variant in variants.values():
        check([f"--config={variant.path}", *variant.args])


def test_every_variant_is_compared_with_one_of_the_table():
    assert set(family.BESIDE.values()) <= family.VARIANTS.keys()


def test_variants_start_from_the_recipes_own_lr():
    variants = family.make_variants(recipes("muon_cpu"))
    stated = yaml.safe_load(recipes("muon_cpu")["muon_cpu"].read_text())
    lr = stated["model"]["init_args"]["optimizer"]["matrix"]["lr"]
    assert variants["muon"].lr == lr
    assert variants["cosmos-muon"].lr == lr / 2
    assert "f_muon" not in variants


def test_recipe_without_variants_is_refused():
    with pytest.raises(Refused, match="adamw_cpu has no variants; give some of"):
        family.make_variants(recipes("adamw_cpu", "muon_cpu"))
