"""Tasks to token ids and back: tokenizers, chat template, end tokens, and what does not fit the context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlpost.errors import RunError
from rlpost.recipe import InitModel, Prompting
from rlpost.types import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHOWN = 5
_PAD, _EOS = "<pad>", "<eos>"


class Renderer:
    """Token ids of prompts and completions, the same for supervised training, rollouts and evaluation."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompting: Prompting,
        context: int,
        eos_ids: Sequence[int] = (),
    ) -> None:
        """`eos_ids`: further end tokens, such as the model's own (`generation_eos_ids`)."""
        self.tokenizer = tokenizer
        self.prompting = prompting
        self.context = context
        self.chat = bool(tokenizer.chat_template) if prompting.chat is None else prompting.chat
        if tokenizer.eos_token_id is None:
            raise RunError("the tokenizer must have an end token: set `eos_token` in its tokenizer_config.json")
        if self.chat and not tokenizer.chat_template:
            raise RunError("tasks.prompting.chat=true needs a tokenizer with a chat template: set it to false or null")
        if prompting.system is not None and not self.chat:
            raise RunError("tasks.prompting.system needs a chat template: use tasks.prompting.prefix instead")
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((int(tokenizer.eos_token_id), *eos_ids)))
        self._alphabet = _closed_alphabet(tokenizer)

    def prompt_ids(self, task: Task) -> tuple[int, ...]:
        """What the model conditions on, up to where the answer starts."""
        if self.chat:
            text = self.tokenizer.apply_chat_template(self._messages(task), tokenize=False, add_generation_prompt=True)
            return self._encode(str(text), special=False)  # the template has written the special tokens, BOS too
        if not isinstance(task.prompt, str):
            raise RunError(
                f"task {task.key}: a prompt of messages needs a chat template, and tasks.prompting.chat is off"
            )
        text = f"{self.prompting.prefix}{task.prompt}{self.prompting.suffix}"
        ids = self._encode(text, special=True)
        return ids[:-1] if ids[-1:] == (self.tokenizer.eos_token_id,) else ids

    def completion_ids(self, solution: str) -> tuple[int, ...]:
        """What supervised training imitates: the solution and the end token."""
        return (*self._encode(solution, special=False), self.stop_ids[0])

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Plain text as it stands, without special tokens."""
        return self._encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _messages(self, task: Task) -> list[dict[str, str]]:
        """The task as messages; prefix and suffix go around the last one."""
        prompt = task.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        last = messages[-1]
        last["content"] = f"{self.prompting.prefix}{last['content']}{self.prompting.suffix}"
        if self.prompting.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.prompting.system})
        return messages

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        if self._alphabet is not None and (unknown := sorted(set(text) - self._alphabet)):
            raise RunError(
                f"model.init.alphabet must have every character of the tasks: {''.join(unknown)!r} of {text[:60]!r} is "
                "not in it; add it, or use model.init.tokenizer=byte"
            )
        return tuple(self.tokenizer.encode(text, add_special_tokens=special))


def check_lengths(tasks: Sequence[Task], renderer: Renderer, max_new_tokens: int, where: str) -> None:
    """Every prompt must leave room for `max_new_tokens`; those that do not are named with their lengths."""
    room = renderer.context - max_new_tokens
    lengths = [(task.key, len(renderer.prompt_ids(task))) for task in tasks]
    long = sorted((pair for pair in lengths if pair[1] > room), key=lambda pair: -pair[1])
    if long:
        shown = ", ".join(f"{key} has {length}" for key, length in long[:SHOWN])
        more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
        raise RunError(
            f"{where}: a prompt may have {room} tokens (model.context {renderer.context} - max_new_tokens "
            f"{max_new_tokens}), and {len(long)} of {len(tasks)} have more ({shown}{more}); raise model.context, lower "
            "max_new_tokens, or take these tasks out"
        )


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or a hub name."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RunError(f"model.path: no tokenizer can be loaded from {folder} ({error})") from error
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def generation_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """The end tokens in a model folder's generation_config.json, which may be more than the tokenizer's one."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return ()
    found = json.loads(path.read_text()).get("eos_token_id")
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def build_tokenizer(init: InitModel) -> PreTrainedTokenizerFast:
    """A tokenizer that needs no hub: one token a character of `init.alphabet`, or one a byte of UTF-8."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = list(init.alphabet) if init.tokenizer == "char" else sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([_PAD, _EOS, *symbols])}
    if init.tokenizer == "char":
        backend = Tokenizer(models.WordLevel(vocab))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        backend.decoder = decoders.Fuse()
    else:
        backend = Tokenizer(models.BPE(vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # `<eos>` in a problem's text is five characters, not the end token
    )


def _closed_alphabet(tokenizer: PreTrainedTokenizerBase) -> frozenset[str] | None:
    """The characters of a `char` tokenizer, which has no unknown token; None for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel" or tokenizer.unk_token is not None:
        return None
    vocab: Mapping[str, int] = tokenizer.get_vocab()
    return frozenset(symbol for symbol in vocab if len(symbol) == 1)
