import json
import os
import sys
import warnings
from operator import attrgetter

import pytest

from rlpost.check import _BOUNDS, check, load_and_check, validate
from rlpost.errors import RecipeError
from rlpost.recipe import CRITIC_LR_RATIO, Recipe, load, to_yaml

SUMS = "rlpost.testbed:chain_sums"
CONFIG = "{split: train, size: 20, min_terms: 3, max_terms: 4}"
GOOD = f"""\
model: {{init: {{tokenizer: char, alphabet: "0123456789+-=;#"}}, dtype: float32, context: 128}}
tasks:
  train: {{path: "{SUMS}", config: {CONFIG}}}
rewards: [{{use: exact_chain}}]
sampling: {{max_new_tokens: 64}}
run_dir: runs
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def to_file(text=GOOD, name="quick.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def problems_of(call, *args):
    with pytest.raises(RecipeError) as raised:
        call(*args)
    return raised.value.problems


def test_load_gives_dataclasses_with_no_hidden_choice_left(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load(write())
    assert isinstance(recipe, Recipe)
    assert (recipe.name, recipe.evaluation.max_new_tokens, recipe.generator.canary_tolerance) == ("quick", 64, 1e-3)
    algorithm = recipe.algorithm
    assert algorithm.loss == {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28}
    assert algorithm.advantage == {"use": "grpo", "scale_by_std": True}
    assert (algorithm.aggregation_tokens, algorithm.critic.pretrain_steps, algorithm.length) == (64, 0, {"use": "none"})
    assert algorithm.critic.lr == CRITIC_LR_RATIO * recipe.engine.lr


def test_load_keeps_what_the_recipe_says(write):
    recipe = load(
        write(), ["name=mine", "algorithm.loss.clip_high=0.4", "evaluation.max_new_tokens=9", "model.dtype=bfloat16"]
    )
    assert (recipe.name, recipe.evaluation.max_new_tokens) == ("mine", 9)
    assert recipe.algorithm.loss == {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.4}
    assert recipe.generator.canary_tolerance == 0.2


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "sft.tasks=a.jsonl",
            "sft.steps=5",
            "tasks.eval=b.jsonl",
            "engine.deepspeed={a: {b: [1, 2]}}",
            "model.context=null",
        ],
        ["tasks.train.prompt='{a} \\boxed{{}}: \"x\"'", "tasks.prompting.suffix='\n#: '", "rewards.0.weight=1e-7"],
    ],
)
def test_to_yaml_loads_to_an_equal_recipe(write, overrides):
    recipe = load(write(), overrides)
    assert load(write(to_yaml(recipe), "other.yaml")) == recipe


def test_overrides_use_yaml_values_and_reach_into_lists(write):
    recipe = load(
        write(),
        [
            "engine.lr=3e-4",
            "rewards.0.weight=2",
            "engine.betas=[0.8, 0.9]",
            "save_every=3",
            "logging.wandb=null",
            "name=7",
        ],
    )
    assert (recipe.engine.lr, recipe.rewards, recipe.engine.betas) == (
        3e-4,
        [{"use": "exact_chain", "weight": 2}],
        [0.8, 0.9],
    )
    assert (recipe.save_every, recipe.logging.wandb, recipe.name) == (3, None, "7")


def test_a_later_override_wins(write):
    assert load(write(), ["steps=1", "steps=2"]).steps == 2


def test_a_value_may_hold_equals_signs_and_colons(write):
    recipe = load(write(), ["tasks.eval=hf:openai/gsm8k:main:test", "tasks.prompting.suffix=a=b"])
    assert recipe.tasks.eval.path == "hf:openai/gsm8k:main:test"
    assert recipe.tasks.prompting.suffix == "a=b"


def test_a_task_source_may_be_its_path(write):
    recipe = load(write("tasks: {train: a.jsonl}"), ["tasks.train.limit=3", "tasks.eval=b.jsonl", "tasks.eval.limit=4"])
    assert (recipe.tasks.train.path, recipe.tasks.train.limit) == ("a.jsonl", 3)
    assert (recipe.tasks.eval.path, recipe.tasks.eval.limit) == ("b.jsonl", 4)


def test_a_key_inside_an_absent_section_makes_it(write):
    recipe = load(write(), ["sft.steps=5", "sft.tasks.path=a.jsonl", "model.init.hidden_size=64"])
    assert (recipe.sft.steps, recipe.sft.batch_size) == (5, 64)
    assert recipe.model.init.hidden_size == 64


def test_null_takes_an_optional_section_away(write):
    recipe = load(write(GOOD + "sft: {tasks: a.jsonl}\n"), ["sft=null", "model.init=null", "model.path=a/b"])
    assert (recipe.sft, recipe.model.init) == (None, None)


def test_a_curriculums_parameter_keeps_the_default_curriculum(write):
    assert load(write(), ["curriculum.floor=0.1"]).curriculum == {"use": "uniform", "floor": 0.1}
    found = load(write(), ["algorithm.name=scalerl", "curriculum.threshold=0.8"]).curriculum
    assert found == {"use": "scalerl", "threshold": 0.8}


def test_the_algorithms_curriculum_gives_way_to_the_recipes(write):
    assert load(write(), ["algorithm.name=scalerl"]).curriculum == {"use": "scalerl"}
    assert load(write(), ["algorithm.name=scalerl", "curriculum.use=uniform"]).curriculum == {"use": "uniform"}


def test_what_follows_from_another_field_is_not_told_twice(write):
    assert check(load(write(), ["sampling.max_new_tokens=0"])) == ["sampling.max_new_tokens must be > 0 (got 0)"]
    assert check(load(write(), ["algorithm.critic.lr=-1"])) == ["algorithm.critic.lr must be > 0 (got -1.0)"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "stpes: no such key, did you mean `steps`?"),
        ("sampling.tempreature=1", "sampling.tempreature: no such key, did you mean `temperature`?"),
        ("model.init.hiden_size=1", "model.init.hiden_size: no such key, did you mean `hidden_size`?"),
        ("tasks.zzz=3", "tasks.zzz: no such key (the keys here are train, more, eval, prompting, decontaminate)"),
        ("steps=ten", "steps must be an integer (got 'ten')"),
        ("steps=1.5", "steps must be an integer (got 1.5)"),
        ("steps=null", "steps must be an integer (got None)"),
        ("steps=[1]", "steps must be an integer (got [1])"),
        ("engine.lr=fast", "engine.lr must be a number (got 'fast')"),
        ("model.context=x", "model.context must be an integer or null (got 'x')"),
        ("engine.zero_stage=4", "engine.zero_stage must be one of 0, 1, 2, 3 (got 4)"),
        ("model.dtype=bf16", "model.dtype must be one of float32, bfloat16 (got 'bf16')"),
        (
            "algorithm.kl.estimator=k9",
            "algorithm.kl.estimator must be one of k1, k2, k3, k1_plus, k3_plus, corrected_k3 (got 'k9')",
        ),
        ("algorithm.clip_high=0.3", "algorithm.clip_high: no such key (the keys here are name, advantage, loss,"),
        ("algorithm.kl.reset.evry=3", "algorithm.kl.reset.evry: no such key, did you mean `every`?"),
        ("algorithm.groups.without_spread=refil", "algorithm.groups.without_spread must be one of keep, drop, refill"),
        (
            "algorithm.aggregation=mean",
            "algorithm.aggregation must be one of token_mean, seq_mean, seq_sum_const, prom",
        ),
        ("algorithm.loss=[1]", "algorithm.loss must be a mapping of keys to values (got [1])"),
        ("model=3", "model must be a mapping of keys to values (got 3)"),
        ("sampling=null", "sampling must be a mapping of keys to values (got None)"),
        ("engine.betas=[a, b]", "engine.betas must be a list, each a number (got ['a', 'b'])"),
        ("rewards=[final_number]", "rewards must be a list, each a mapping of keys to values (got ['final_number'])"),
        ("curriculum=uniform", "curriculum must be a mapping of keys to values (got 'uniform')"),
        ("tasks.prompting.chat=maybe", "tasks.prompting.chat must be true or false or null (got 'maybe')"),
        ("sft.steps=3", "sft.tasks.path must be given"),
        ("steps", "`steps` must be key=value, as in `engine.lr=1e-6`"),
        ("rewards.5.weight=1", "rewards.5.weight: `rewards.5.weight=1` sets a part of something that is not there"),
        ("steps={a", "steps: the value in `steps={a` must be YAML"),
    ],
)
def test_load_names_the_key_that_is_wrong(write, override, message):
    (problem,) = problems_of(load, write(), [override])
    assert problem.startswith(message)


def test_load_reports_every_wrong_line_at_once(write):
    text = "steps: x\nmodel: {dtype: half, pth: a}\nengine: {lr: y, zero_stage: 7}\n"
    assert len(problems_of(load, write(text))) == 6  # five, and tasks.train.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\nname: x\n", r"quick.yaml, line 2: must be YAML"),
        ("steps: 1\nsteps: 2\n", r"quick.yaml, line 2: must be YAML (found duplicate key steps)"),
        ("- 1\n", "must hold keys and values, as in `steps: 100` (got list)"),
        ("name: ${nowhere}\n", "must be YAML (Interpolation key 'nowhere' not found)"),
    ],
)
def test_load_names_the_line_that_is_no_yaml(write, text, message):
    (problem,) = problems_of(load, write(text))
    assert message in problem


def test_load_names_a_missing_file(tmp_path):
    (problem,) = problems_of(load, tmp_path / "none.yaml")
    assert problem == f"the recipe {tmp_path / 'none.yaml'} cannot be read (No such file or directory): check its path"


def test_load_makes_plugins_beside_the_recipe_importable(write, tmp_path):
    (tmp_path / "mylab_beside.py").write_text("def brevity(rollout, *, target: int = 3): return 0.0\n")
    path = write()
    assert check(load(path, ['rewards=[{use: "mylab_beside:brevity", target: 5, weight: 0.1}]'])) == []
    (problem,) = check(load(path, ['rewards=[{use: "mylab_beside:brevity", target: x}]']))
    assert problem == "rewards.0.target must be int (got 'x')"


def test_check_finds_nothing_wrong_with_a_good_recipe(write):
    recipe = load(write())
    assert check(recipe) == check(recipe, world_size=4) == []
    validate(recipe)
    assert load_and_check(write()) == recipe
    assert not os.path.exists("runs")


EVAL = ["tasks.eval.path=e.jsonl"]
SFT = [f"sft.tasks.path={SUMS}", f"sft.tasks.config={CONFIG}", "sft.tasks.solution=solution"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=a/b"], "exactly one of model.path and model.init must be given (got both)"),
        (["model.init=null"], "exactly one of model.path and model.init must be given (got neither)"),
        (["model.init=null", "model.path=./none"], "model.path: the folder './none' does not exist"),
        (["model.init=null", "model.path=a/b/c"], "model.path: the folder 'a/b/c' does not exist"),
        (["model.init=null", "model.path=none.gguf"], "model.path: the file none.gguf does not exist"),
        (["model.init=null", "model.path=empty"], "model.path: the folder empty must have a config.json"),
        (["model.init=null", "model.path=quick.yaml"], "model.path must be a folder, a hub name or a .gguf file"),
        (["model.init.alphabet=''"], "model.init.alphabet must be given"),
        (["model.init.alphabet=aba"], "model.init.alphabet must have each character once (repeated: 'a')"),
        (["model.init.hidden_size=130"], "model.init.hidden_size must be a multiple of model.init.num_heads"),
        (["model.init.hidden_size=160"], "model.init.hidden_size / model.init.num_heads must be one of 32, 64"),
        (["model.init.num_kv_heads=3"], "model.init.num_heads must be a multiple of model.init.num_kv_heads"),
        (["engine.sequence_parallel=0"], "engine.sequence_parallel must be > 0 (got 0)"),
        (["model.offload_activations=true"], "model.offload_activations needs model.gradient_checkpointing=true (got"),
        (["model.attention=flash_attention_2"], "model.attention=flash_attention_2 must have model.dtype=bfloat16"),
        (["tasks.train=none.jsonl"], "tasks.train.path: the file none.jsonl does not exist"),
        (["tasks.train.config.sise=3"], "tasks.train.config.sise: `rlpost.testbed:chain_sums` has no such parameter"),
        ([*EVAL, "tasks.eval.limit=0"], "tasks.eval.limit must be >= 1"),
        ([*EVAL, "evaluation.by=levle", "tasks.eval.extra=[level]"], "evaluation.by must be one of tasks.eval.extra"),
        (["rewards=[]"], "rewards must name at least one reward"),
        (["rewards.0.use=exact_chan"], "rewards.0.use: rewards/ has no `exact_chan`, did you mean `exact_chain`?"),
        (["rewards.0.weight=high"], "rewards.0.weight must be a finite number (got 'high')"),
        (["rewards.0.strict=1"], "rewards.0.strict: `exact_chain` has no such parameter"),
        (["curriculum.floor=1"], "curriculum.floor: `uniform` has no such parameter"),
        (
            ["curriculum.use=half_curriculum:Half"],
            "curriculum.use: `half_curriculum:Half` must have the methods observe,",
        ),
        (["sampling.group_size=1"], "sampling.group_size must be >= 2 for algorithm.advantage.use=grpo (got 1)"),
        (
            ["sampling.top_p=0.9"],
            "sampling.top_p must be 1.0 in training (got 0.9): the trainer's log-probs are over the full vocabulary "
            "and the sampler's mask is not replayed, so it would be another policy; use sampling.temperature",
        ),
        (["sampling.top_k=50"], "sampling.top_k must be 0 in training (got 50)"),
        (["prompts_per_step=6"], "prompts_per_step must be a multiple of the number of ranks (got 6 on 4)"),
        (
            ["algorithm.minibatches=3"],
            "prompts_per_step must divide into algorithm.minibatches on every rank (got 8 a rank",
        ),
        (["sampling.max_new_tokens=128", "evaluation.max_new_tokens=9"], "sampling.max_new_tokens must be less than"),
        (
            ["algorithm.interruption.text=stop", "algorithm.interruption.answer_tokens=64"],
            "sampling.max_new_tokens + algorithm.interruption.answer_tokens must be less than model.context, which "
            "holds the prompt too (got 64 + 64 and 128)",
        ),
        (["evaluation.max_new_tokens=999"], "evaluation.max_new_tokens must be less than model.context"),
        ([*SFT, "sft.batch_size=6"], "sft.batch_size must be a multiple of the number of ranks (got 6 on 4)"),
        ([*SFT, "sft.tasks.solution=null"], "sft.tasks.solution must name the column"),
        ([*SFT, "sft.betas=[0.9]"], "sft.betas must be two numbers in [0, 1) (got [0.9])"),
        (["engine.betas=[0.9, 1.0]"], "engine.betas must be two numbers in [0, 1)"),
        (
            ["engine.offload_optimizer=true", "engine.zero_stage=0"],
            "engine.offload_optimizer needs engine.zero_stage >= 1",
        ),
        (["run_dir=quick.yaml/runs"], "run_dir must be a folder"),
        (["resume=atuo"], "resume must be never, auto, or the path of a checkpoint that exists (got 'atuo')"),
        (["steps=0"], "steps must be > 0 (got 0)"),
        (["engine.lr=0"], "engine.lr must be > 0 (got 0.0)"),
        (["engine.lr=.nan"], "engine.lr must be > 0 (got nan)"),
        (["engine.lr=.inf"], "engine.lr must be > 0 (got inf)"),
        (["sampling.temperature=0"], "sampling.temperature must be > 0 (got 0.0)"),
        (["algorithm.kl.coef=-1"], "algorithm.kl.coef must be >= 0 (got -1.0)"),
        (["algorithm.kl.horizon=0"], "algorithm.kl.horizon must be > 0 (got 0.0)"),
        (["algorithm.entropy.top_frac=0"], "algorithm.entropy.top_frac must be in (0, 1] (got 0.0)"),
        (["algorithm.critic.lam=1.1"], "algorithm.critic.lam must be in [0, 1] (got 1.1)"),
        (["algorithm.critic.gamma=0"], "algorithm.critic.gamma must be in (0, 1] (got 0.0)"),
        (["evaluation.n=0"], "evaluation.n must be > 0 (got 0)"),
        (["evaluation.top_p=0"], "evaluation.top_p must be in (0, 1] (got 0.0)"),
        ([*SFT, "sft.decay_frac=1.5"], "sft.decay_frac must be in (0, 1] (got 1.5)"),
        (["save_every=-1"], "save_every must be >= 0 (got -1)"),
        (["model.init.num_heads=0"], "model.init.num_heads must be > 0 (got 0)"),
    ],
)
def test_check_finds_each_problem(write, tmp_path, overrides, message):
    path = write()
    (tmp_path / "empty").mkdir()
    write("", "e.jsonl")
    write(
        "class Half:\n    def __init__(self, tasks, *, seed): ...\n    def select(self, n): ...\n", "half_curriculum.py"
    )
    found = check(load(path, overrides), world_size=4)
    (problem,) = (problem for problem in found if "flash-attn" not in problem)  # that one depends on the machine
    assert problem.startswith(message)


def test_bounds_speak_of_fields_that_exist(write):
    recipe = load(write(), ["model.init.num_kv_heads=2", "model.lora.rank=16", *SFT])
    for _, _, keys in _BOUNDS:
        for key in keys.split():
            attrgetter(key)(recipe)


def test_check_knows_the_context_of_a_model_folder(write, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    recipe = load(write(), ["model.init=null", "model.path=model", "model.context=null"])
    assert check(recipe)[0] == (
        "sampling.max_new_tokens must be less than model.context, which holds the prompt too (got 64 and 64)"
    )


def test_check_lets_a_hub_name_be(write):
    assert check(load(write(), ["model.init=null", "model.path=HuggingFaceTB/SmolLM2-135M-Instruct"])) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_check_names_an_unwritable_run_dir(write, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert check(load(write(), ["run_dir=locked/runs"]))[0].startswith("run_dir must be writable")


def test_load_and_check_reports_wrong_lines_and_wrong_combinations_together(write):
    overrides = ["steps=ten", "model.context=x", "sampling.group_size=1", "engine.lr=-1"]
    assert [problem.split()[0] for problem in problems_of(load_and_check, write(), overrides)] == [
        "model.context",
        "steps",
        "engine.lr",
        "sampling.group_size",
    ]


def test_load_and_check_says_nothing_more_about_a_section_it_could_not_read(write):
    assert len(problems_of(load_and_check, write(), ["model=3"])) == 1
    assert problems_of(load_and_check, write("rewards: [{use: exact_chain}]\nmodel: {path: a/b}\n")) == [
        "tasks.train.path must be given"
    ]


def test_validate_raises_what_check_finds(write):
    recipe = load(write(), ["steps=0", "engine.lr=0"])
    assert (
        problems_of(validate, recipe)
        == check(recipe)
        == ["steps must be > 0 (got 0)", "engine.lr must be > 0 (got 0.0)"]
    )


def test_a_choice_given_as_plain_text_takes_parameters_as_well(write):
    recipe = load(write(), ["algorithm.loss=clip_cov", "algorithm.loss.frac=0.3"])
    assert recipe.algorithm.loss["use"] == "clip_cov" and recipe.algorithm.loss["frac"] == 0.3
