"""i1's mixtures take one line of a recipe, and what stands beside it changes them."""

from pathlib import Path

import pytest

from mixing.corpus_check import check_recipe
from pipeline.catalog import CATALOG
from pipeline.errors import EvenmixError
from pipeline.presets import PRESETS
from pipeline.recipe import PublishedCaptions, Recipe, SourceCaptions, load_recipe, preset_recipe

ONE_LINE = 'root = "corpus"\n[mixture]\npreset = "i1-256-0.4M"\n'


def load(folder: Path, text: str) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return load_recipe(str(folder / "recipe.toml"))


@pytest.mark.parametrize(
    ("name", "resolution", "num_datasets", "images_per_dataset", "weights"),
    [
        ("i1-256", 256, 11, None, "equal"),
        ("i1-256-1.0M", 256, 11, 1_000_000, "equal"),
        ("i1-256-0.4M", 256, 11, 400_000, "equal"),
        ("i1-256-0.1M", 256, 11, 100_000, "equal"),
        ("i1-512", 512, 10, 1_000_000, "equal"),
        ("i1-512-full", 512, 10, None, "equal"),
        ("i1-512-0.4M", 512, 10, 400_000, "equal"),
        ("i1-512-0.1M", 512, 10, 100_000, "equal"),
        ("i1-1024", 1024, 5, 1_000_000, "equal"),
        ("i1-1024-full", 1024, 5, None, "equal"),
        ("i1-1024-0.4M", 1024, 5, 400_000, "equal"),
        ("i1-1024-0.1M", 1024, 5, 100_000, "equal"),
        ("i1-256-12-datasets", 256, 12, None, "size"),
        ("i1-256-without-megalith-places", 256, 9, None, "equal"),
    ],
)
def test_a_preset_is_what_i1_has(
    name: str, resolution: int, num_datasets: int, images_per_dataset: int | None, weights: str
) -> None:
    recipe = preset_recipe(name, "corpus")
    mixture = recipe.mixture
    assert (mixture.name, mixture.resolution, mixture.crop) == (name, resolution, "square")
    assert (mixture.images_per_dataset, mixture.weights) == (images_per_dataset, weights)
    assert len(recipe.mixture_datasets()) == num_datasets
    assert recipe.datasets == {n: CATALOG[n].dataset for n in recipe.mixture_datasets()}
    assert recipe.captions == {"i1": PublishedCaptions(engine="published")}
    assert mixture.captions == "i1"


def test_all_presets_are_tried_above() -> None:
    assert len(PRESETS) == 14


def test_each_stage_has_the_datasets_of_i1() -> None:
    everything = set(CATALOG)
    assert everything - set(PRESETS["i1-256"].datasets) == {"inaturalist"}
    assert everything - set(PRESETS["i1-512"].datasets) == {"inaturalist", "yfcc"}
    assert PRESETS["i1-1024"].datasets == (
        "fluxreason", "gptedit", "midjourneyv6", "redcaps", "textatlas",
    )  # fmt: skip
    left_out = set(PRESETS["i1-256"].datasets) - set(
        PRESETS["i1-256-without-megalith-places"].datasets
    )
    assert left_out == {"megalith10m", "places365-challenge2016"}


def test_a_recipe_of_one_line_is_the_same_as_the_command_line(tmp_path: Path) -> None:
    assert load(tmp_path, ONE_LINE) == preset_recipe("i1-256-0.4M", "corpus")


def test_a_recipe_that_was_dumped_is_the_same_again(tmp_path: Path) -> None:
    recipe = load(tmp_path, ONE_LINE)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    own = recipe.mixture.model_copy(update={"preset": None})
    recipe = recipe.model_copy(update={"mixture": own})
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_what_the_recipe_says_itself_changes_the_preset(tmp_path: Path) -> None:
    text = ONE_LINE + (
        'name = "mine"\nimages_per_dataset = 5\nweights = "cap:3"\nresolution = 128\n'
        'captions = "own"\nwithout = ["megalith10m"]\n'
        '[datasets.redcaps]\ncatalog = "redcaps"\nthreshold = 0.9\n'
        '[datasets.more]\nlayout = "folder"\nsource = "more"\nlicence = "CC0 1.0"\n'
        '[captions.own]\nengine = "source"\n'
    )
    recipe = load(tmp_path, text)
    mixture = recipe.mixture
    assert (mixture.name, mixture.resolution, mixture.weights) == ("mine", 128, "cap:3")
    assert (mixture.images_per_dataset, mixture.captions) == (5, "own")
    assert recipe.captions["own"] == SourceCaptions(engine="source")
    assert recipe.datasets["redcaps"].threshold == 0.9
    # What the mixture goes without is not ingested for it; what it does not name, is not in it.
    assert "megalith10m" not in recipe.datasets
    assert set(recipe.mixture_datasets()) == recipe.datasets.keys() - {"more"}
    assert len(recipe.mixture_datasets()) == 10


def test_datasets_beside_a_preset_are_the_mixtures_own(tmp_path: Path) -> None:
    text = ONE_LINE + (
        'datasets = ["pexels", "more"]\n'
        '[datasets.more]\nlayout = "folder"\nsource = "more"\nlicence = "CC0 1.0"\n'
    )
    recipe = load(tmp_path, text)
    assert recipe.mixture_datasets() == ["more", "pexels"]
    assert recipe.datasets.keys() == {"more", "pexels"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("0.4M", "0.4m", "'i1-256-0.4m' is none of i1's mixtures; did you mean 'i1-256-0.4M'?"),
        ("i1-256-0.4M", "all", "'all' is none of i1's mixtures; there are i1-256"),
        ("[mixture]", '[mixture]\nwithout = ["megalith"]', "did you mean 'megalith10m'?"),
        ("[mixture]", '[mixture]\ndatasets = ["pexel"]', "names 'pexel', not among datasets"),
        ("[mixture]", '[mixture]\ndatasets = "pexels"', "mixture.datasets: Input should be a"),
        ("[mixture]", "[mixture]\ndatasets = [{}]", "mixture.datasets.0: Input should be a"),
        ("[mixture]", "[mixture]\nimages = 3", "mixture.images: unknown key"),
        ('root = "corpus"', 'root = "corpus"\ncaptions = 3', "captions: Input should be a"),
    ],
)
def test_mistakes_beside_a_preset(tmp_path: Path, old: str, new: str, expected: str) -> None:
    with pytest.raises(EvenmixError) as caught:
        load(tmp_path, ONE_LINE.replace(old, new))
    assert expected in str(caught.value)


def test_an_unknown_preset_of_the_command_line_is_told() -> None:
    with pytest.raises(EvenmixError) as caught:
        preset_recipe("i1-265", "corpus")
    assert (
        str(caught.value) == "--preset: 'i1-265' is none of i1's mixtures; did you mean 'i1-256'?"
    )


# Datasets whose pictures the published captions do not know


def test_captions_that_cannot_be_joined_are_told_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(EvenmixError) as caught:
        check_recipe(preset_recipe("i1-512", "corpus"))
    told = str(caught.value)
    assert "no picture of megalith10m, midjourneyv6 would have a caption" in told
    assert 'captions_of = { megalith10m = "own", midjourneyv6 = "own" }' in told
    assert 'without = ["megalith10m", "midjourneyv6"]' in told
    # What is told is what works.
    without = 'without = ["megalith10m", "midjourneyv6"]\n'
    check_recipe(load(tmp_path, ONE_LINE + without))
    own = (
        'captions_of = { megalith10m = "own", midjourneyv6 = "own" }\n'
        '[captions.own]\nengine = "vllm"\n'
    )
    recipe = load(tmp_path, ONE_LINE + own)
    check_recipe(recipe)
    assert recipe.datasets_of_set("own") == ["megalith10m", "midjourneyv6"]


def test_a_rule_for_the_identifier_makes_published_captions_join(tmp_path: Path) -> None:
    rules = "".join(
        f'[datasets.{name}]\ncatalog = "{name}"\njoin_rule = "{{id}}"\n'
        for name in ("megalith10m", "midjourneyv6")
    )
    check_recipe(load(tmp_path, ONE_LINE + rules))
