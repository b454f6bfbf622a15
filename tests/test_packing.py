"""Packed tensors: restored to the last bit, by us and by a plain reading of docs/files.md; damage is refused by name."""

from __future__ import annotations

import copy
import json
import tracemalloc
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nettrim import InvalidInput, packing

DTYPES = list(packing.DTYPES.values())
FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sparse(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int = 0, minus: float = 0.0) -> Tensor:
    """Entries with random bytes (denormal numbers among them) at ``density``; of the others a share ``minus`` are -0.0."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize
    numel = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (numel, size), generator=generator, dtype=torch.uint8)
    draw = torch.rand(numel, generator=generator)
    raw[draw >= density] = 0
    if dtype.is_floating_point:
        raw[draw >= 1 - (1 - density) * minus, -1] = 0x80
    return raw.view(-1).view(dtype).view(shape)


def weights(density: float, numel: int = 100_000) -> Tensor:
    """Normal numbers, the largest of which stay: what pruning by magnitude leaves."""
    drawn = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    least = drawn.abs().kthvalue(int((1 - density) * (numel - 1)) + 1).values
    return torch.where(drawn.abs() >= least, drawn, 0.0)


def read_by_the_book(stored: dict[str, Tensor], header: str) -> dict[str, bytes]:
    """docs/files.md in plain Python, byte by byte."""
    said = json.loads(header)
    assert said["version"] == 1
    state = {key: bits(value) for key, value in stored.items() if not key.startswith(said["prefix"])}
    for key, values in said["tensors"].items():
        entry = dict(zip(said["fields"], values, strict=True))
        data, parts, numel = bits(stored[said["prefix"] + key]), [], 1
        for length in entry["shape"]:
            numel *= length
        lengths = [entry["gaps"]] if entry["coding"] == "gaps" else [-(-numel // 8)] if entry["coding"] == "bitmask" else []
        lengths += [-(-(numel - entry["listed"]) // 8)] if entry["negative_zeros"] else []
        lengths += [entry["listed"]] * packing.DTYPES[entry["dtype"]].itemsize
        for decoded, size in zip(lengths, entry["sections"], strict=True):
            parts.append(data[:size] if size == decoded else zlib.decompress(data[:size], -15))
            data = data[size:]
        places, at = [], -1
        if entry["coding"] == "gaps":
            for gap in parts.pop(0):
                at += gap if gap == 255 else gap + 1
                places += [] if gap == 255 else [at]
        elif entry["coding"] == "bitmask":
            where = parts.pop(0)
            places = [i for i in range(numel) if where[i // 8] >> i % 8 & 1]
        else:
            places = list(range(numel))
        size = packing.DTYPES[entry["dtype"]].itemsize
        rows = [bytearray(size) for _ in range(numel)]
        if entry["negative_zeros"]:
            signs, listed = parts.pop(0), set(places)
            for i, place in enumerate(place for place in range(numel) if place not in listed):
                rows[place][-1] = 0x80 * (signs[i // 8] >> i % 8 & 1)
        for i, place in enumerate(places):
            rows[place] = bytearray(plane[i] for plane in parts)
        state[key] = b"".join(rows)
        said_first = json.dumps([entry["dtype"], entry["shape"]], separators=(",", ":")).encode()
        assert zlib.crc32(said_first + state[key]) == entry["crc32"]
    return state


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 9), max_size=3).map(lambda sizes: (*sizes, 40)),
    density=st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]),
    minus=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    codings=st.sampled_from([packing.CODINGS, ("gaps",), ("bitmask",), ("dense",)]),
    seed=st.integers(0, 1000),
)
def test_every_bit_comes_back(
    dtype: torch.dtype, shape: tuple[int, ...], density: float, minus: float, codings: tuple[str, ...], seed: int
) -> None:
    state = {"a": sparse(shape, dtype, density, seed, minus), "b": torch.tensor(seed)}
    stored, header = packing.pack(state, codings)
    back, book = packing.unpack(stored, header), read_by_the_book(stored, header)
    assert back.keys() == book.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        assert bits(back[key]) == bits(value) == book[key]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_packed_by_every_coding(dtype: torch.dtype) -> None:
    value = sparse((30, 50), dtype, 0.04, minus=0.4)
    for coding in packing.CODINGS:
        made = packing.packed(value, [coding])
        assert made is not None and made[0].coding == coding
        assert (made[0].negative_zeros > 0) == (dtype.is_floating_point and coding != "dense")
        assert packing.Entry.from_list("a", json.loads(json.dumps(made[0].to_list()))) == made[0]
        assert bits(packing.restored("a", *made)) == bits(value)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 5000])
def test_gaps_about_the_escape(gap: int) -> None:
    value = torch.zeros(2 * gap + 300)
    value[gap] = value[2 * gap + 1] = value[-1] = 1.5
    made = packing.packed(value, ["gaps"])
    assert made is not None and made[0].listed == len({gap, 2 * gap + 1, 2 * gap + 299})
    assert torch.equal(packing.restored("a", *made), value)


def test_nothing_and_everything() -> None:
    for value in (torch.zeros(5000), torch.full((70, 70), 2.5), torch.full((5000,), -0.0), torch.zeros(3000, dtype=torch.int64)):
        stored, header = packing.pack({"a": value})
        assert list(stored) == ["packed:a"] and stored["packed:a"].numel() < 120
        assert bits(packing.unpack(stored, header)["a"]) == bits(value)


def test_views_and_layouts_of_memory() -> None:
    value = sparse((40, 60), torch.float32, 0.1)
    for seen in (value.T, value[::2, 1::3], value.view(4, 10, 6, 10).permute(3, 1, 0, 2)):
        back = packing.unpack(*packing.pack({"a": seen}))["a"]
        assert back.shape == seen.shape and bits(back) == bits(seen)


def test_the_smallest_coding_is_taken() -> None:
    found = set()
    for density in (0.01, 0.05, 0.2, 0.5, 1.0):
        value = weights(density)
        sizes = {coding: made[0].payload_bytes for coding in packing.CODINGS if (made := packing.packed(value, [coding]))}
        made = packing.packed(value)
        assert made is not None and made[0].payload_bytes == min(sizes.values()) == made[1].numel()
        found.add(made[0].coding)
    blocks = torch.zeros(300, 300)
    blocks[::3] = weights(0.9, 300)  # whole rows
    made = packing.packed(blocks)
    assert made is not None
    assert len(found | {made[0].coding}) == 3  # each of them is the smallest somewhere


@pytest.mark.parametrize(("density", "most"), [(0.02, 0.022), (0.05, 0.05), (0.1, 0.097), (1.0, 0.85)])
def test_near_the_entropy(density: float, most: float) -> None:
    """Positions take H(density) bits an entry; of 32 bits of a value, the exponent's few are what can be saved."""
    value = weights(density)
    stored, header = packing.pack({"a": value})
    assert stored["packed:a"].numel() + len(header) <= most * 4 * value.numel()


def test_signs_of_zeros_take_one_bit() -> None:
    value = weights(0.05)
    masked = torch.where(value != 0, value, weights(1.0) * 0.0)  # what a product with a mask leaves
    assert int((masked.signbit() & (masked == 0)).sum()) > 40_000
    stored, header = packing.pack({"a": masked})
    assert stored["packed:a"].numel() + len(header) <= 0.08 * 4 * value.numel()


def test_what_saves_nothing_stays_as_it_is() -> None:
    noise = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    state = {
        "noise": noise,
        "small": torch.zeros(8),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "complex": torch.zeros(900, dtype=torch.complex64),
    }
    stored, header = packing.pack(state)
    assert stored.keys() == state.keys() and all(stored[key] is value for key, value in state.items())
    assert packing.unpack(stored, header).keys() == state.keys()


def test_keys_of_the_user_never_clash() -> None:
    state = {key: weights(0.05, 4000) + i for i, key in enumerate(("a", "packed:a", "packed:packed:a", "packed:", "Größe"))}
    state = {key: torch.where(value == i, 0.0, value) for i, (key, value) in enumerate(state.items())}
    stored, header = packing.pack({**state, "packed:small": torch.ones(2)})
    back = packing.unpack(stored, header)
    assert all(torch.equal(back[key], value) for key, value in state.items()) and torch.equal(back["packed:small"], torch.ones(2))


def made(coding: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored, header = packing.pack({"one.weight": sparse((40, 50), dtype, 0.05, minus=0.5), "bias": torch.ones(3)}, [coding])
    return stored, json.loads(header)


@pytest.mark.parametrize("coding", packing.CODINGS)
def test_every_flipped_bit_is_noticed(coding: str) -> None:
    stored, header = made(coding)
    text = json.dumps(header)
    good = bits(packing.unpack(stored, text)["one.weight"])
    payload, refused = stored["packed:one.weight"], 0
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, payload.numel(), (300,), generator=generator).tolist():
        damaged = payload.clone()
        damaged[place] ^= 1 << (place % 8)
        try:
            assert bits(packing.unpack({**stored, "packed:one.weight": damaged}, text)["one.weight"]) == good
        except InvalidInput as error:
            assert "tensor 'one.weight'" in str(error)
            refused += 1
    assert refused >= 290  # the bits that fill up the last byte of a deflate block mean nothing


@pytest.mark.parametrize("coding", packing.CODINGS)
def test_another_number_in_the_header_is_noticed(coding: str) -> None:
    stored, header = made(coding)
    entry = header["tensors"]["one.weight"]
    numbers: list[tuple[Any, Any]] = [(entry, packing.FIELDS.index(key)) for key in ("listed", "negative_zeros", "gaps", "crc32")]
    for key in ("shape", "sections"):
        found = entry[packing.FIELDS.index(key)]
        numbers += [(found, i) for i in range(len(found))]
    for place, key in numbers:
        right = place[key]
        for wrong in (right + 1, right - 1, 0, -1, 2**40, 2**80, 1.5, True, None, "7"):
            if wrong == right and type(wrong) is int:
                continue
            place[key] = wrong
            with pytest.raises(InvalidInput, match=r"tensor 'one\.weight'"):
                packing.unpack(stored, json.dumps(header))
        place[key] = right
    packing.unpack(stored, json.dumps(header))


@pytest.mark.parametrize("change", [{"dtype": "I32"}, {"shape": [50, 40]}, {"shape": [2000]}, {"shape": [1, 40, 50]}])
def test_the_same_bytes_as_something_else_are_noticed(change: dict[str, Any]) -> None:
    """Another dtype of the same size, or another shape of as many entries, fits everything else that the header says."""
    stored, text = packing.pack({"one.weight": sparse((40, 50), torch.float32, 0.05)})
    header = json.loads(text)
    assert header["tensors"]["one.weight"][packing.FIELDS.index("negative_zeros")] == 0
    for key, value in change.items():
        header["tensors"]["one.weight"][packing.FIELDS.index(key)] = value
    with pytest.raises(InvalidInput, match=r"tensor 'one\.weight': its bytes do not have the stated checksum"):
        packing.unpack(stored, json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F99"}, "dtype must be one of F64"),
        ({"dtype": []}, "dtype must be one of F64"),
        ({"dtype": "F64"}, "its sections hold"),
        ({"dtype": "I32"}, "negative_zeros must be an integer from 0 to 0"),
        ({"gaps": 1}, "gaps must be an integer from"),
        ({"crc32": 2**32}, "crc32 must be an integer from 0 to 4294967295"),
        ({"coding": "lzma"}, "coding must be one of gaps, bitmask, dense"),
        ({"coding": {}}, "coding must be one of"),
        ({"shape": 3}, "shape must be a list"),
        ({"shape": [2000, 0]}, "positive integers"),
        ({"shape": [1] * 65}, "at most 64 positive"),
        ({"shape": [2**40, 2**40]}, "more bytes than can be addressed"),
        ({"sections": []}, "its sections hold"),
        ({"sections": [9999] * 6}, "its sections hold .*cannot be stored in"),
        ({"sections": [[1, 2, 3]]}, "sections must be a list of byte counts"),
        ({"sections": None}, "sections must be a list of byte counts"),
        ({"listed": 2001}, "listed must be at most the 2000 entries"),
    ],
)
def test_entries_that_nobody_wrote(change: dict[str, Any], message: str) -> None:
    stored, header = made("gaps")
    for key, value in change.items():
        header["tensors"]["one.weight"][packing.FIELDS.index(key)] = value
    with pytest.raises(InvalidInput, match=f"tensor 'one.weight': .*{message}.*damaged"):
        packing.unpack(stored, json.dumps(header))


def test_headers_that_nobody_wrote() -> None:
    stored, header = made("gaps")
    for text in ("", "{", "[" * 100_000, "[]", "null", '{"version": 0}', '{"version": "1"}', '{"version": true}'):
        with pytest.raises(InvalidInput, match=r"header of packed tensors: .*damaged"):
            packing.unpack(stored, text)
    for change in ({"prefix": ""}, {"prefix": None}, {"tensors": []}, {"fields": ["shape"]}, {"fields": None}):
        with pytest.raises(InvalidInput, match="must hold a prefix"):
            packing.unpack(stored, json.dumps({**header, **change}))
    for entry in (3, {}, header["tensors"]["one.weight"][:-1]):
        with pytest.raises(InvalidInput, match=r"its entry must be a list of dtype, shape, .*found"):
            packing.unpack(stored, json.dumps({**header, "tensors": {"one.weight": entry}}))
    with pytest.raises(InvalidInput, match=r"version 2 is later than 1.*upgrade nettrim, or save the weights again without"):
        packing.unpack(stored, json.dumps({**header, "version": 2, "tensors": "of another form"}))


def test_tensors_and_header_must_belong_together() -> None:
    stored, header = made("gaps")
    text, payload = json.dumps(header), stored["packed:one.weight"]
    with pytest.raises(InvalidInput, match=r"there is no 'packed:one\.weight'"):
        packing.unpack({"bias": stored["bias"]}, text)
    with pytest.raises(InvalidInput, match=r"'one\.weight': it is stored both packed and as it is"):
        packing.unpack({**stored, "one.weight": payload}, text)
    with pytest.raises(InvalidInput, match="'packed:two': the header of packed tensors does not speak of it"):
        packing.unpack({**stored, "packed:two": payload}, text)
    for wrong in (payload[:-1], torch.cat((payload, payload)), payload.float(), payload[None]):
        with pytest.raises(InvalidInput, match=r"'one.weight': it must be stored as \d+ bytes"):
            packing.unpack({**stored, "packed:one.weight": wrong}, text)


def crafted(coding: str, numel: int, parts: list[tuple[int, bytes]], listed: int, dtype: str = "U8") -> tuple[dict[str, Tensor], str]:
    """A file as an attacker would make it: consistent lengths, payload as given."""
    gaps = parts[0][0] if coding == "gaps" else 0
    entry = [dtype, [numel], coding, listed, 0, gaps, [len(data) for _, data in parts], 0]
    data = b"".join(data for _, data in parts)
    payload = bytearray(max(len(data), -(-numel // packing.EXPANSION)))
    payload[: len(data)] = data
    header = {"version": 1, "prefix": "packed:", "fields": packing.FIELDS, "tensors": {"a": entry}}
    return {"packed:a": torch.frombuffer(payload, dtype=torch.uint8)}, json.dumps(header)


def deflated(data: bytes) -> bytes:
    return zlib.compress(data, 9, -15)


@pytest.mark.parametrize(
    ("coding", "numel", "parts", "listed", "message"),
    [
        ("gaps", 9, [(2, b"\x04\x05"), (2, b"ab")], 2, "position 10, past the end of its 9 entries"),
        ("gaps", 600, [(3, b"\xff\xff\x5a"), (1, b"a")], 1, "position 600, past the end"),
        ("gaps", 9, [(2, b"\x04\x04"), (3, b"abc")], 3, "gaps must be an integer from 3 to 3, found 2"),
        ("gaps", 600, [(2, b"\x04\x04"), (1, b"a")], 1, "positions are those of 2 values, the header says 1"),
        ("bitmask", 9, [(2, b"\x01\x02"), (2, b"ab")], 2, "position 9, past the end of its 9 entries"),
        ("bitmask", 9, [(2, b"\x01\x01"), (1, b"a")], 1, "positions are those of 2 values"),
        ("dense", 9, [(9, b"abcdefgh")], 9, "a section is not a deflate stream"),
        ("dense", 9, [(9, b"abcdefghi")], 9, "do not have the stated checksum"),
        ("dense", 99, [(99, deflated(bytes(100)))], 99, "does not decode to its stated 99 bytes"),
        ("dense", 99, [(99, deflated(bytes(98)))], 99, "does not decode to its stated 99 bytes"),
        ("dense", 99, [(99, deflated(bytes(99))[:-1])], 99, "does not decode to its stated 99 bytes"),
        ("dense", 99, [(99, deflated(bytes(99)) + b"more")], 99, "does not decode to its stated 99 bytes"),
    ],
)
def test_what_does_not_add_up(coding: str, numel: int, parts: list[tuple[int, bytes]], listed: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=f"tensor 'a': .*{message}"):
        packing.unpack(*crafted(coding, numel, parts, listed))


def test_a_bool_that_is_neither() -> None:
    stored, header = crafted("dense", 9, [(9, b"\x00\x01\x02" * 3)], 9, "BOOL")
    right = zlib.crc32(b'["BOOL",[9]]' + bytes([0, 1, 2] * 3))
    header = header.replace("[9], 0]", f"[9], {right}]")
    with pytest.raises(InvalidInput, match="a bool must be 0 or 1"):
        packing.unpack(stored, header)


def test_bombs_are_not_unpacked() -> None:
    bomb = deflated(bytes(50_000_000))
    # a stream that would become 50 MB, of a tensor of 60,000 bytes
    stored, header = crafted("dense", 60_000, [(60_000, bomb)], 60_000)
    # 10^15 entries, none of them listed, in as many bytes as this machine can hold: nothing at all, or a thousandth of what is needed
    claims = json.loads(crafted("gaps", 10, [(0, b""), (0, b"")], 0)[1])
    claims["tensors"]["a"][packing.FIELDS.index("shape")] = [10**15]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="does not decode to its stated 60000 bytes"):
            packing.unpack(stored, header)
        with pytest.raises(InvalidInput, match="it must be stored as 976562500000 bytes"):
            packing.unpack({"packed:a": torch.zeros(10, dtype=torch.uint8)}, json.dumps(claims))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_nothing_is_stored_in_less_than_a_reader_demands() -> None:
    value = torch.zeros(10_000_000, dtype=torch.uint8)
    made = packing.packed(value)
    assert made is not None and made[1].numel() == -(-10_000_000 // 1024)
    assert torch.equal(packing.restored("a", *made), value)


def test_the_state_is_only_read() -> None:
    state = {"a": weights(0.05, 5000), "b": torch.ones(3)}
    before = copy.deepcopy(state)
    first, second = packing.pack(state), packing.pack(state)
    assert first[1] == second[1] and all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, header = made("gaps")
    monkeypatch.setattr(packing.sys, "byteorder", "big")
    for call in (lambda: packing.pack({}), lambda: packing.unpack(stored, header)):  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="lowest byte first"):
            call()
