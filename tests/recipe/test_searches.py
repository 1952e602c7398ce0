"""Search files: what they mean, the ways to write one wrongly, templates, sweeps and genomes."""

import pytest

from mergemill.engine.errors import RecipeError
from mergemill.engine.recipe.genomes import Genome, make_genes, make_genome_recipe
from mergemill.engine.recipe.objectives import Objective
from mergemill.engine.recipe.searches import parse_search
from mergemill.engine.recipe.sweeps import make_sweep
from mergemill.engine.recipe.templates import check_variables, parse_template, read_template

WHOLE = """\
recipe: recipe.yml
variables:
  chat: {low: 0.0, high: 1.5, start: 0.5}
  depth: {low: 0, high: 1, layers: 4}
objective: {command: 'score {model}', direction: max}
budget: {evaluations: 20, hours: 6, stall: 30}
"""
HEAD = "recipe: r.yml\nobjective: {command: 'score {model}'}\n"
ONE = "variables: {x: {low: 0, high: 1}}\n"

FAULTS = {
    "": "1: the search file is empty; it needs recipe, variables and objective",
    f"{HEAD}": "1: a search of a recipe needs the key 'variables' (and 1 more)",
    f"{HEAD}{ONE}": "1: 'budget' needs evaluations or hours: strategy cma has no end of its own",
    f"{HEAD}variables: {{x: {{low: 1, high: 1}}}}\n": "3: 'low' is 1 and must be less than high, 1",
    f"{HEAD}variables: {{x: {{low: 0}}}}\n": "3: a variable with 'low' needs 'high'",
    f"{HEAD}variables: {{x: {{low: 0, high: 1, start: 2}}}}\n": "3: 'start' is 2, outside of low 0 and high 1",
    f"{HEAD}variables: {{x: {{low: 0, high: 1, log: true}}}}\n": "3: 'low' is 0; with log it must be above 0",
    f"{HEAD}variables: {{x: {{choices: [a, a]}}}}\n": "3: 'choices' has an item twice",
    f"{HEAD}variables: {{x: {{lwo: 0, high: 1}}}}\n": "3: unknown key 'lwo'; did you mean 'low'?",
    f"{HEAD}variables: {{x: {{choices: [a, b]}}}}\nbudget: {{evaluations: 3}}\n": (
        "3: 'x' has choices, which grid, random, sobol, tpe, nsga2 can search and cma cannot"
    ),
    f"{HEAD}{ONE}strategy: {{name: sobol, sigma: 0.1}}\nbudget: {{evaluations: 3}}\n": (
        "4: 'sigma' has no place in strategy sobol; it has seed, racing"
    ),
    f"{HEAD}{ONE}strategy: {{name: nsga2}}\nbudget: {{evaluations: 3}}\n": (
        "4: 'strategy' is nsga2, which searches several objectives; write them as the items of a sum"
    ),
    f"{HEAD}{ONE}strategy: {{racing: true}}\nbudget: {{evaluations: 3}}\n": (
        "4: 'racing' is for the objective perplexity, whose windows can be judged by halves"
    ),
    f"{HEAD}{ONE}strategy: {{name: gird}}\n": "4: 'name' is the text 'gird'; did you mean 'grid'?",
    f"{HEAD}{ONE}strategy: {{name: grid}}\n": (
        "3: 'x' needs choices, or the strategy 'steps': a grid has so many values of it"
    ),
    f"{HEAD}{ONE}strategy: {{name: grid, steps: 1000000000}}\n": (
        "4: 'steps' must be from 2 to 10000, not the number 1000000000"
    ),
    f"{HEAD}variables: {{x: {{low: 0, high: 1, layers: 7}}}}\nstrategy: {{name: grid, steps: 10}}\n": (
        "4: 'strategy' has 1e+07 candidates as a grid; 1,000,000 are the most, or take sobol"
    ),
    "recipe: r.yml\nvariables: {x: {low: 0, high: 1}}\nobjective: {}\n": (
        "3: an objective needs exactly one of perplexity, entropy, few_shot, command, lm_eval, sum; none is here"
    ),
    "recipe: r.yml\nvariables: {x: {low: 0, high: 1}}\nbudget: {hours: 1}\n": (
        "1: a search file needs the key 'objective'"
    ),
}


@pytest.mark.parametrize(("text", "message"), FAULTS.items())
def test_a_bad_search_file_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_search(text)
    assert str(caught.value) == f"search.yml:{message}"


def test_a_search_file_is_a_frozen_value() -> None:
    search = parse_search(WHOLE)
    assert search.variables["chat"].start == 0.5
    assert search.variables["depth"].layers == 4
    assert search.strategy.name == "cma"
    assert search.objective is not None
    assert search.objective.sign == -1


RECIPE = """\
models:
  - {model: a, parameters: {weight: "${chat}", density: '${depth}'}}
  - {model: b, parameters: {weight: 1}}
merge_method: ties
base_model: base
"""


def test_values_are_put_in_and_the_text_says_the_same() -> None:
    filled = parse_template(RECIPE, name="r.yml").fill({"chat": 0.25, "depth": (0.1, 0.9)})
    assert filled.models is not None
    assert dict(filled.models[0].parameters) == {"weight": 0.25, "density": (0.1, 0.9)}
    assert parse_template(filled.text, name="r.yml").fill({}) == filled
    assert filled.file == "r.yml"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["chat"], "r.yml:2: ${depth} is no variable; known here: chat"),
        (["chat", "dept", "depth"], "r.yml: does not use the variable 'dept', as a value ${dept}; it has ${chat}, "),
    ],
)
def test_variables_and_their_uses_must_be_the_same(names: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_variables(parse_template(RECIPE, name="r.yml"), names)
    assert str(caught.value).startswith(message)


def test_a_fault_of_a_candidate_is_told_by_the_recipes_line() -> None:
    with pytest.raises(RecipeError, match=r"^r\.yml:5: "):
        parse_template(RECIPE.replace("base_model: base", "base_model: ${base}"), name="r.yml").fill(
            {"chat": 1, "depth": 1, "base": 3}
        )


def test_a_sweeps_values_are_decimals_with_both_ends() -> None:
    search = make_sweep("r.yml", ["x=0:0.3:0.1", "m=ties,sce", "n=3:1:-1"], Objective(command="s {model}"))
    choices = {name: variable.choices for name, variable in search.variables.items()}
    assert choices == {"x": (0.0, 0.1, 0.2, 0.3), "m": ("ties", "sce"), "n": (3, 2, 1)}


@pytest.mark.parametrize("vary", ["x", "x=", "x=0:1:0", "x=1:0:0.1", "x=0:a:1", "x=[]"])
def test_a_sweep_that_leads_nowhere_is_refused(vary: str) -> None:
    with pytest.raises(RecipeError, match=r"^--vary x"):
        make_sweep("r.yml", [vary], Objective(command="s {model}"))


def test_a_genomes_variables_are_the_flattened_genotype() -> None:
    """Shape [groups, models, filters + 1, parameters], in that order."""
    genome = Genome(
        models=["a", "b"], merge_method="dare_ties", base_model="base", layer_granularity=2, filters=["mlp"]
    )
    genes = make_genes(genome, 4)
    assert len(genes) == 2 * 2 * 2 * 2
    assert list(genes)[:5] == [
        "group0.model0.mlp.weight",
        "group0.model0.mlp.density",
        "group0.model0.rest.weight",
        "group0.model0.rest.density",
        "group0.model1.mlp.weight",
    ]
    recipe = make_genome_recipe(genome, 4)
    filled = read_template(recipe).fill({name: place / 100 for place, name in enumerate(genes)})
    assert filled.slices is not None
    assert [[source.layer_range for source in each.sources] for each in filled.slices] == [[(0, 2)] * 3, [(2, 4)] * 3]
    first, second, base = filled.slices[1].sources
    assert not base.parameters
    assert [each.value for each in first.parameters["weight"]] == [0.08, 0.10]  # type: ignore[union-attr]
    assert [each.filter for each in second.parameters["density"]] == ["mlp", None]  # type: ignore[union-attr]
    assert dict(filled.parameters) == {"normalize": True}


def test_a_smooth_genome_is_gradients_over_its_groups() -> None:
    genome = Genome(models=["a", "b"], merge_method="linear", layer_granularity=1, smooth=True)
    genes = make_genes(genome, 3)
    filled = read_template(make_genome_recipe(genome, 3)).fill(dict.fromkeys(genes, 0.5))
    assert filled.models is not None
    assert filled.models[0].parameters["weight"] == (0.5, 0.5, 0.5)


EVOLVE = """\
genome: {models: [a, b], merge_method: linear}
tasks:
  - {name: mine, weight: 0.5}
  - {name: gsm8k, metric: "exact_match,strict-match"}
limit: 20
num_fewshot: 0
budget: {evaluations: 3}
"""


def test_mergekits_file_of_a_genome_is_judged_by_its_tasks() -> None:
    objective = parse_search(EVOLVE).objective
    assert objective is not None
    assert objective.lm_eval is not None
    assert [(each.task, each.metric, each.weight) for each in objective.lm_eval.tasks] == [
        ("mine", "acc,none", 0.5),
        ("gsm8k", "exact_match,strict-match", 1.0),
    ]
    assert (objective.lm_eval.limit, objective.lm_eval.num_fewshot, objective.lm_eval.apply_chat_template) == (
        20,
        0,
        True,
    )
    assert (objective.sign, objective.benchmarks, objective.by_text) == (-1, ("gsm8k",), False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{EVOLVE}objective: {{command: 's {{model}}'}}\n", "1: tasks stand for an objective; here are both"),
        (f"{EVOLVE}shuffle: true\n", "8: 'shuffle' is true: then each candidate would be judged on other samples"),
        (
            f"{HEAD}{ONE}limit: 3\nstrategy: {{name: line}}\n",
            "4: 'limit' is for tasks; write it into the objective lm_eval",
        ),
        (
            f"recipe: r.yml\n{ONE}objective: {{lm_eval: {{tasks: [{{task: a, metrics: b}}]}}}}\n",
            "3: unknown key 'metrics'; did you mean 'metric'?",
        ),
    ],
)
def test_a_bad_file_of_tasks_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_search(text)
    assert str(caught.value).startswith(f"search.yml:{message}")


def test_slerps_gene_is_t_itself() -> None:
    genome = Genome(models=["a", "b"], merge_method="slerp")
    assert make_genes(genome, 4) == {"group0.model0.rest.t": {"low": 0.0, "high": 1.0, "start": 0.5}}
    filled = read_template(make_genome_recipe(genome, 4)).fill({"group0.model0.rest.t": 0.25})
    assert filled.slices is not None
    assert filled.slices[0].parameters["t"] == 0.25
    assert str(filled.base_model) == "a"
