"""Conversations to be fine-tuned on: their tokens, and which of them are answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2d.packages import need

HFDS = "hfds/"
IGNORED = -100  # the label that transformers' losses leave out
ROLES = ("system", "user", "assistant", "tool")
PLAIN = {"system": "{}\n", "user": "User: {}\n", "tool": "Tool: {}\n", "assistant": "Assistant:"}
"""How a conversation is written for a tokenizer without a chat template."""


class Conversation(NamedTuple):
    """Messages, each with ``role`` and ``content``, and the picture they are about: a file, a PIL image, or None."""

    messages: list[dict[str, str]]
    image: Any = None


def read_conversations(source: str, option: str) -> list[Conversation]:
    """Conversations from a file or a table.

    Args:
        source: a file of JSON lines, or ``hfds/`` and a name of the hub or a folder, with ``:SPLIT`` behind it
            (default: train). A row has ``messages`` (as Dolci), or ``question`` and ``answer`` (as GSM8K), and may
            have an ``image``: a path, relative to the file, or a column of pictures.
        option: the argument it comes from, for messages.

    Raises:
        ValueError: for what does not exist, and for a row that is no conversation with an answer, by its number.
        ImportError: without a package that reading it needs.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "train.jsonl")
        ...     _ = file.write_text('{"question": "2 + 3?", "answer": "#### 5"}')
        ...     [message["role"] for message in read_conversations(str(file), "--data")[0].messages]
        ['user', 'assistant']

    Paper: appendix F (Dolci, GSM8K).
    """
    rows = _hugging_face(source, option) if source.startswith(HFDS) else _json_lines(source, option)
    base = None if source.startswith(HFDS) else Path(source).parent
    found = [_conversation(row, base, f"{option} {source}, row {number}") for number, row in enumerate(rows, start=1)]
    if not found:
        raise ValueError(f"{option} {source} holds no conversations: give data that does")
    return found


def _json_lines(source: str, option: str) -> Iterable[Any]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{option} {source} does not exist: give a file of JSON lines, or hfds/NAME")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{option} {source}, line {number} is not JSON ({error}): repair it") from None


def _hugging_face(source: str, option: str) -> Iterable[Any]:
    datasets = need("datasets", f"{option} {source}")
    name, _, split = source.removeprefix(HFDS).partition(":")
    datasets.utils.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of the hub, the network or the file, each of its own class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{option} {source} cannot be read ({reason}): give a name of the hub, or a folder that "
            "datasets.load_dataset reads"
        ) from None


def _conversation(row: Any, base: Path | None, where: str) -> Conversation:
    messages = _messages(row, where)
    image = row.get("image")
    if isinstance(image, str):
        image = Path(image) if base is None else base / image
        if not image.is_file():
            raise ValueError(f"{where}: there is no picture {image}")
    return Conversation(messages, image)


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    row = row if isinstance(row, Mapping) else {}
    found = row.get("messages")
    if found is None and "question" in row and "answer" in row:
        found = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise ValueError(f"{where} has neither messages nor question and answer: it has {', '.join(row) or 'nothing'}")
    for message in found:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a message needs role ({', '.join(ROLES)}) and content, a text")
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError(f"{where} has no answer: it needs a message of the assistant")
    return [{"role": message["role"], "content": message["content"]} for message in found]


def encode(
    tokenizer: Any, conversation: Conversation, max_length: int, *, image_token: str = "<image>", image_size: int = 0
) -> dict[str, list[int]]:
    """The tokens of a conversation, cut to ``max_length``; labels are the answers', all else is left out of the loss.

    Each answer follows what the chat template puts before it when it generates; the end of a turn is part of it.

    Args:
        tokenizer: of transformers, or a processor with its chat template.
        conversation: from :func:`read_conversations`.
        max_length: in tokens.
        image_token: what stands for the picture in a text.
        image_size: how many of these tokens the picture becomes.

    Returns:
        ``input_ids`` and ``labels``, of one length.

    Raises:
        ValueError: for a chat template that changes what it wrote before as a conversation grows.

    Paper: none.
    """
    words = getattr(tokenizer, "tokenizer", tokenizer)
    messages, picture = conversation.messages, conversation.image is not None
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, answer: bool) -> None:
        text = text.replace(image_token, image_token * image_size) if picture else text
        new = words(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        labels.extend(new if answer else [IGNORED] * len(new))

    def write(some: Sequence[Mapping[str, str]], ask: bool) -> str:
        if tokenizer.chat_template:
            shown = _with_picture(some) if picture else list(some)
            return tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=ask)
        return (f"{image_token}\n" if picture else "") + _plain(some, words.eos_token or "", ask)

    written = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = write(messages[:position], True), write(messages[: position + 1], False)
        if not prompt.startswith(written) or not whole.startswith(prompt):
            raise ValueError(
                "the tokenizer's chat template rewrites earlier turns, so that answers cannot be told from the rest: "
                "give conversations of one answer, or another template"
            )
        add(prompt[len(written) :], False)
        add(whole[len(prompt) :], True)
        written = whole
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def _with_picture(messages: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Messages as the templates of vision-language models take them, the picture before the first."""
    found = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    found[0]["content"].insert(0, {"type": "image"})
    return found


def _plain(messages: Sequence[Mapping[str, str]], end: str, ask: bool) -> str:
    """Turns without a template, ready for an answer if ``ask``."""
    text = ""
    for message in messages:
        text += PLAIN[message["role"]].format(message["content"])
        if message["role"] == "assistant":
            text += f" {message['content']}{end}\n"
    return text + PLAIN["assistant"] if ask else text.removesuffix("\n")
