import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlpost.errors import RunError
from rlpost.recipe import InitModel, Prompting
from rlpost.render import Renderer, build_tokenizer, check_lengths, generation_eos_ids, load_tokenizer
from rlpost.types import Task

CHAR = InitModel(tokenizer="char", alphabet="0123456789+-=;#")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    """Bytes, with a chat template, and a begin token that both the template and the tokenizer write."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(["<bos>", "<end>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(tokenizer, ids):
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return "".join(pieces).replace("\u0120", " ")


def test_char_tokenizer_is_one_token_a_character():
    renderer = Renderer(build_tokenizer(CHAR), Prompting(), 64)
    ids = renderer.prompt_ids(Task("a", "7-0+6="))
    assert ids == (9, 13, 2, 12, 8, 14)
    assert renderer.decode(ids) == "7-0+6="
    assert renderer.stop_ids == (1,)


def test_completion_ends_with_the_end_token_and_decodes_without_it():
    renderer = Renderer(build_tokenizer(CHAR), Prompting(), 64)
    ids = renderer.completion_ids("7+6=13;#13")
    assert len(ids) == 11 and ids[-1] == renderer.stop_ids[0]
    assert renderer.decode(ids) == "7+6=13;#13"


def test_char_tokenizer_names_a_character_outside_its_alphabet():
    renderer = Renderer(build_tokenizer(CHAR), Prompting(), 64)
    with pytest.raises(RunError, match=r"model\.init\.alphabet must have every character of the tasks: '\*x'"):
        renderer.prompt_ids(Task("a", "7*x="))
    with pytest.raises(RunError, match=r"model\.init\.alphabet"):
        renderer.completion_ids("7 ")


@pytest.mark.parametrize(
    "text", ["plain", "  two  spaces \r\n\t", "h\u00e9llo \u65e5\u672c \U0001f389", "<eos> <pad>", "\x00\x7f"]
)
def test_byte_tokenizer_round_trips_any_text(text):
    renderer = Renderer(build_tokenizer(InitModel(tokenizer="byte")), Prompting(), 64)
    ids = renderer.prompt_ids(Task("a", text))
    assert renderer.decode(ids) == text
    assert len(ids) == len(text.encode())


@pytest.mark.parametrize(("init", "size"), [(CHAR, 17), (InitModel(tokenizer="byte"), 258)])
def test_built_tokenizers_survive_a_folder(tmp_path, init, size):
    built = build_tokenizer(init)
    built.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(built) == len(loaded) == size
    for tokenizer in (built, loaded):
        renderer = Renderer(tokenizer, Prompting(), 64)
        assert renderer.decode(renderer.completion_ids("7-0=7;#7")) == "7-0=7;#7"
    assert Renderer(built, Prompting(), 64).prompt_ids(Task("a", "1+2=")) == renderer.prompt_ids(Task("a", "1+2="))


def test_loaded_char_tokenizer_still_refuses_other_characters(tmp_path):
    build_tokenizer(CHAR).save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"model\.init\.alphabet"):
        Renderer(load_tokenizer(tmp_path), Prompting(), 64).prompt_ids(Task("a", "x"))


def test_a_folder_without_a_tokenizer_is_one_message(tmp_path):
    with pytest.raises(RunError, match=r"model\.path: no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_plain_prompt_has_prefix_and_suffix():
    renderer = Renderer(build_tokenizer(InitModel()), Prompting(prefix="Q: ", suffix="\nA:"), 64)
    assert renderer.decode(renderer.prompt_ids(Task("a", "1+1="))) == "Q: 1+1=\nA:"


def test_plain_prompt_keeps_the_begin_token_and_no_end_token(chat_tokenizer):
    renderer = Renderer(chat_tokenizer, Prompting(chat=False), 64)
    assert text_of(chat_tokenizer, renderer.prompt_ids(Task("a", "hi"))) == "<bos>hi"


def test_chat_prompt_is_the_template_with_one_begin_token(chat_tokenizer):
    renderer = Renderer(chat_tokenizer, Prompting(prefix="<", suffix=">", system="be brief"), 64)
    ids = renderer.prompt_ids(Task("a", "hi"))
    assert text_of(chat_tokenizer, ids) == "<bos>[system]be brief[user]<hi>[assistant]"
    assert all(type(token) is int for token in ids)


def test_chat_prompt_of_messages_keeps_them_and_their_system_message(chat_tokenizer):
    messages = ({"role": "system", "content": "own"}, {"role": "user", "content": "hi"})
    renderer = Renderer(chat_tokenizer, Prompting(suffix="!", system="ours"), 64)
    assert text_of(chat_tokenizer, renderer.prompt_ids(Task("a", messages))) == "<bos>[system]own[user]hi![assistant]"
    assert messages[1]["content"] == "hi"


def test_chat_completion_has_no_begin_token(chat_tokenizer):
    renderer = Renderer(chat_tokenizer, Prompting(), 64)
    assert text_of(chat_tokenizer, renderer.completion_ids("ok")) == "ok<end>"


def test_messages_without_a_chat_template_are_named():
    renderer = Renderer(build_tokenizer(InitModel()), Prompting(), 64)
    with pytest.raises(RunError, match="task a: a prompt of messages needs a chat template"):
        renderer.prompt_ids(Task("a", ({"role": "user", "content": "hi"},)))


@pytest.mark.parametrize(
    ("prompting", "key"),
    [(Prompting(chat=True), "tasks.prompting.chat"), (Prompting(system="x"), "tasks.prompting.system")],
)
def test_what_needs_a_chat_template_is_refused_without_one(prompting, key):
    with pytest.raises(RunError, match=key):
        Renderer(build_tokenizer(InitModel()), prompting, 64)


@pytest.mark.parametrize(("found", "ids"), [(None, ()), (5, (5,)), ([1, 5], (1, 5))])
def test_generation_eos_ids_reads_one_or_several(tmp_path, found, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert generation_eos_ids(tmp_path) == ids
    assert generation_eos_ids(tmp_path / "none") == ()


def test_stop_ids_are_the_tokenizers_and_the_models_each_once():
    assert Renderer(build_tokenizer(InitModel()), Prompting(), 64, eos_ids=(7, 1)).stop_ids == (1, 7)


def test_check_lengths_names_prompts_that_leave_no_room():
    renderer = Renderer(build_tokenizer(CHAR), Prompting(), 10)
    tasks = [Task("short", "1+1="), Task("long", "1+1+1+1="), Task("longer", "1+1+1+1+1=")]
    check_lengths(tasks[:1], renderer, 6, "tasks.train")
    with pytest.raises(RunError) as raised:
        check_lengths(tasks, renderer, 6, "tasks.train")
    assert str(raised.value).startswith(
        "tasks.train: a prompt may have 4 tokens (model.context 10 - max_new_tokens 6), and 2 of 3 have more "
        "(longer has 10, long has 8); raise model.context"
    )
