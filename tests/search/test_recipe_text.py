"""The recipes that a search writes."""

from types import SimpleNamespace

from search_fakes import searching
from tersor import recipe
from tersor.recipe import DataSource, Network
from tersor.recipe.data_source import YOUR_DATA
from tersor.search.candidate import Candidate


def test_the_recipe_of_a_search_in_python_contains_comments_with_what_to_write(tmp_path):
    search = searching(tmp_path / "out")
    shared = search.bench.experiment
    shared.data = SimpleNamespace(train=SimpleNamespace(channels=1), mean=(0.25,), std=(0.5,))
    shared.recipe = shared.recipe.model_copy(update={"data": DataSource(name=YOUR_DATA)})
    text = search.recipe_text(Candidate(), (Candidate().rounding,))
    assert "# model: {name: package.module:function, weights: FILE}" in text
    assert "# folder: PATH, or name: package.module:function" in text
    assert "# teacher: {" in search.recipe_text(Candidate("wide"), (Candidate().rounding,))
    (tmp_path / "recipe.yaml").write_text(text)
    data = recipe.read(tmp_path / "recipe.yaml").data
    assert (data.channels, data.mean, data.std) == (1, (0.25,), (0.5,))


def test_the_recipe_of_a_search_on_the_command_line_has_no_comments(tmp_path):
    search = searching(tmp_path / "out")
    network = Network(name="resnet20", weights="w.safetensors")
    search.bench.experiment.recipe = search.bench.experiment.recipe.model_copy(update={"model": network})
    assert "#" not in search.recipe_text(Candidate(), (Candidate().rounding,))
