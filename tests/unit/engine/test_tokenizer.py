"""Tokens and text, and the promise that pieces joined are the whole."""

import asyncio
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.tokenizer import ChatRenderer, Tokenizer
from kvcache.errors import ModelError, RequestError
from tests.fakes import END_TOKEN, render_plainly, tiny_backend
from tests.unit.workers import tiny_gguf

TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces  and\n\nlines\t",
    "Grüße, naïve café",
    "你好世界こんにちは天気",
    "😀👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 emoji",
    "e\u0301 combining, \u202b right to left \u202c",
    "\ufffd already replaced \ufffd",
    "a" * 200,
    "\x00\x01 control",
    f"text {END_TOKEN} more",
]


DAMAGED: dict[str, dict[str, object]] = {
    "of no kind": {"tokenizer.json": {"model": {"type": "Nonsense"}}},
    "without a vocabulary": {"tokenizer.json": {"model": {"type": "BPE", "merges": []}}},
    "a list": {"tokenizer.json": []},
    "cut off": {"tokenizer.json": {}},
    "settings that are a list": {"tokenizer_config.json": []},
    "settings of no class": {"tokenizer_config.json": {"tokenizer_class": 5}},
}


@pytest.mark.parametrize("files", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_tokenizer_is_named(tmp_path: Path, files: dict[str, object]) -> None:
    tiny_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    Tokenizer.from_checkpoint(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        Tokenizer.from_checkpoint(tmp_path)


def byte_level() -> Tokenizer:
    backend = tiny_backend(TEXTS)
    backend.add_tokens([AddedToken("é", special=False), AddedToken("世界", special=False), "<tool>"])
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a space mark, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", END_TOKEN, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "é", "\ufffd"]
    pieces += [chr(code) for code in range(0x20, 0x7F)]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(END_TOKEN, special=True)])
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "hello", "world", "##s", "##ly", ",", ".", "don", "'", "t"]
    backend = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend)


KINDS = {"byte-level": byte_level(), "byte fallback": byte_fallback(), "word piece": word_piece()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]


def joined(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_join_to_its_decode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for length in range(len(ids) + 1):  # every cut, so that characters break in all places
        assert joined(tokenizer, ids[:length]) == tokenizer.decode(ids[:length])


def test_the_pieces_of_random_tokens_join_to_their_decode(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    beyond = tokenizer.vocab_size + 3  # a padded vocabulary has ids that mean nothing
    for _ in range(1500):
        ids = [rng.randrange(beyond) for _ in range(rng.randrange(1, 30))]
        assert joined(tokenizer, ids) == tokenizer.decode(ids)


def test_a_byte_level_text_comes_back_as_it_was() -> None:
    tokenizer = Tokenizer(tiny_backend())
    for text in TEXTS[:-1]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_is_shown_when_its_last_byte_comes() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("x") * 2, *(id_of_byte(tokenizer, byte) for byte in "😀".encode())]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(token_id) for token_id in ids] == ["x", "x", "", "", "", "😀"]
    assert detokenizer.flush() == ""


def test_an_incomplete_character_is_shown_at_the_end() -> None:
    tokenizer = byte_level()
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(id_of_byte(tokenizer, b)) for b in "😀".encode()[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_long_run_of_byte_tokens_does_not_fall_silent() -> None:
    tokenizer = byte_fallback()
    text = "ကမ္ဘာ" * 40  # every character of it three byte tokens
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    longest_silence = max(len(gap) for gap in "".join("." if piece else " " for piece in pieces).split("."))
    assert longest_silence < 70
    assert "".join(pieces) + detokenizer.flush() == text


def id_of_byte(tokenizer: Tokenizer, byte: int) -> int:
    """The token that is one byte: found by encoding a character that has it, in a vocabulary of single bytes."""
    single = tokenizers.Tokenizer(models.BPE())
    single.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    character = next(c for c in "😀" if byte in c.encode())
    mark = single.pre_tokenizer.pre_tokenize_str(character)[0][0][character.encode().index(byte)]
    found = tokenizer._backend.token_to_id(mark)
    assert found is not None
    return found


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(f"a{END_TOKEN}b")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{END_TOKEN}b"


def test_a_chat_ends_where_the_answer_begins() -> None:
    tokenizer = Tokenizer(tiny_backend(), render_plainly)
    ids = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "user: hi\nassistant:"


@pytest.mark.parametrize(
    ("render", "messages"),
    [(None, [{"role": "user", "content": "hi"}]), (render_plainly, [{"role": "tool", "content": "42"}])],
)
def test_a_chat_that_cannot_be_rendered_is_the_fault_of_the_request(
    render: ChatRenderer | None, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(RequestError) as caught:
        Tokenizer(tiny_backend(), render).render_chat(messages)
    assert caught.value.param == "messages"


def test_threads_share_a_tokenizer() -> None:
    tokenizer = byte_level()
    text = "hello world " * 500

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(asyncio.to_thread(tokenizer.encode, text) for _ in range(8)))

    results = asyncio.run(all_at_once())
    assert all(result == results[0] for result in results)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_backend().save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_brings_its_tokenizer_and_template(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer.encode("hello world") == Tokenizer(tiny_backend()).encode("hello world")
    ids = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "<user>hi<assistant>"
    with pytest.raises(RequestError, match="no tools here"):
        tokenizer.render_chat([{"role": "tool", "content": "42"}])


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        Tokenizer.from_checkpoint(tmp_path)


def test_a_gguf_file_brings_its_tokenizer_and_template(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tiny_gguf.write_tiny_gguf(file, tiny_gguf.tiny_tensors(np.random.default_rng(1)))
    tokenizer = Tokenizer.from_checkpoint(file)
    ids = tokenizer.render_chat([{"role": "user", "content": "hell"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hell<|im_end|>"
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)


def test_importing_the_tokenizer_does_not_load_torch() -> None:
    code = "import sys, engine.tokenizer; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
