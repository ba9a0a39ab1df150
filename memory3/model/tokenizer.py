"""Text to token ids and back, chat prompts, and the opening tokens of references and contexts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

Messages = Sequence[Mapping[str, str]]


class Tokenizer:
    """A `tokenizers` tokenizer with a chat template.

    encode(text) treats everything in `text` as text: "<|im_end|>" typed by a user is a few ordinary tokens.
    encode(text, special=True) turns special tokens in the text into their ids (templates, prefixes). Neither adds a
    BOS by itself: what opens a sequence is in MemoryConfig (prefix_ids, context_bos_ids).
    `hash` covers vocabulary, merges, splitting rules and special tokens; not the chat template.
    """

    def __init__(
        self,
        raw: RawTokenizer,
        plain: RawTokenizer | None = None,
        *,
        chat_template: str | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        hash: str | None = None,
    ) -> None:
        """raw parses special tokens, plain does not (made from raw when left out)."""
        self._raw = raw
        if plain is None:
            plain = RawTokenizer.from_str(raw.to_str())
            plain.encode_special_tokens = True
        self._plain = plain
        self.chat_template = chat_template
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(int(i) for i in eos_ids))
        self.hash = hash if hash is not None else hashlib.sha256(raw.to_str().encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, and where present tokenizer_config.json, generation_config.json,
        config.json (end-of-sequence ids) and chat_template.jinja.

        Raises FileNotFoundError when there is no tokenizer.json.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json (a fast tokenizer is needed); save it there with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        raw = RawTokenizer.from_file(str(path))
        raw.no_padding()
        raw.no_truncation()
        config = _read_json(folder / "tokenizer_config.json")
        eos: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            eos += value if isinstance(value, list) else [] if value is None else [value]
        ids = {key: raw.token_to_id(_token_text(config[key])) for key in ("bos_token", "eos_token") if config.get(key)}
        if ids.get("eos_token") is not None:
            eos.append(ids["eos_token"])
        return cls(raw, chat_template=_template_text(folder, config), bos_id=ids.get("bos_token"), eos_ids=eos)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (bos, eos, chat template) as `from_folder` reads them."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        config = {key: self._raw.id_to_token(i) for key, i in names.items() if i is not None}
        if self.chat_template:
            config["chat_template"] = self.chat_template
        self._raw.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    # -- text ---------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; special tokens in it are parsed only when `special` is set."""
        return (self._raw if special else self._plain).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """encode for many texts at once."""
        raw = self._raw if special else self._plain
        return [e.ids for e in raw.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        return self._raw.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    @property
    def vocab_size(self) -> int:
        return self._raw.get_vocab_size()

    @cached_property
    def opens_with_space(self) -> bool:
        """Whether the tokenizer itself puts a space before a text's first word (SentencePiece vocabularies)."""
        ids = self.encode("a")
        return bool(ids) and (self._raw.id_to_token(ids[0]) or "").startswith("\u2581")

    def encode_reference(self, text: str) -> list[int]:
        """Tokens of a reference as they follow the prefix: with one leading space, outer white space dropped."""
        text = text.strip()
        return self.encode(text if self.opens_with_space or not text else " " + text)

    # -- chat ---------------------------------------------------------------------------------------------

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The chat template filled with messages ({"role", "content"} each). Raises ValueError without a template.

        The template runs in a sandbox: it comes with the checkpoint.
        """
        if not self.chat_template:
            raise ValueError("this checkpoint has no chat template; pass a plain prompt instead of messages")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise ValueError(f"messages[{i}] must be a dict with 'role' and 'content', got {message!r}")
        bos = self._raw.id_to_token(self.bos_id) if self.bos_id is not None else ""
        eos = self._raw.id_to_token(self.eos_ids[0]) if self.eos_ids else ""
        return self._template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        )

    def chat(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat. Special tokens count only where the template wrote them, not inside a message."""
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        # A template may look at the content (trim it, test it), so it first runs on the real messages; the marks only
        # locate the contents, and where they cannot be told apart the text is encoded whole.
        text = self.render_chat(messages, add_generation_prompt)
        marked = self.render_chat(
            [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], add_generation_prompt
        )
        if not any(self._has_special(str(m["content"])) for m in messages):
            return self.encode(text, special=True)
        ids: list[int] = []
        rest = marked
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise ValueError(
                    "a message contains special tokens as text and this chat template does not keep messages in order; "
                    "remove them from the message"
                )
            ids += self.encode(before, special=True) + self.encode(str(message["content"]))
        return ids + self.encode(rest, special=True)

    def _has_special(self, text: str) -> bool:
        return any(token in text for token in self._special_texts)

    @cached_property
    def _special_texts(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._raw.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise ValueError(f"the chat template refuses these messages: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
        return environment.from_string(self.chat_template)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _token_text(value: Any) -> str:
    return value["content"] if isinstance(value, Mapping) else str(value)


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
