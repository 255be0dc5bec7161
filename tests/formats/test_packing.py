"""The bit stream: golden bytes, its definition by Python integers, and the package that engines read with."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.packing import pack_codes, unpack_codes, words_of


def stream(row: list[int], bits: int) -> bytes:
    """A row as one large integer, code i at bit i * bits, cut into little-endian bytes; whole 32-bit words."""
    number = sum(code << (bits * i) for i, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 32) * 4, "little")


def written(codes: list[int], bits: int) -> bytes:
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), bits)
    return packed.numpy().astype("<i4").tobytes()


def test_golden_bytes():
    # 2 bits: 0 + 1*4 + 2*16 + 3*64 = 228 = e4, a byte for four codes.
    assert written([0, 1, 2, 3] * 4, 2).hex() == "e4e4e4e4"
    # 3 bits: an octal digit a code, first code last: 0o76543210 = 0xfac688, 24 of the word's 32 bits.
    assert written([0, 1, 2, 3, 4, 5, 6, 7], 3).hex() == "88c6fa00"
    # 3 bits: the eleventh code has bits 30 to 32, so of 6 = 0b110 bits 31 and 32 are set: in two words.
    assert written([0] * 10 + [6], 3).hex() == "0000008001000000"
    # 4 bits: a hex digit a code, low digit first.
    assert written([0, 1, 2, 3, 4, 5, 6, 15], 4).hex() == "103254f6"
    # 8 bits: a byte a code.
    assert written([0, 1, 254, 255], 8).hex() == "0001feff"


codes_of_bits = st.integers(2, 8).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.integers(1, 70).flatmap(
            lambda count: st.lists(
                st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count), min_size=1, max_size=3
            )
        ),
    )
)


@settings(max_examples=150, deadline=None)
@given(codes_of_bits)
def test_stream_and_round_trip(case: tuple[int, list[list[int]]]):
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (len(rows), words_of(len(rows[0]), bits))
    assert packed.numpy().astype("<i4").tobytes() == b"".join(stream(row, bits) for row in rows)
    assert torch.equal(unpack_codes(packed, bits, len(rows[0])), codes)


def random_codes(rows: int, count: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("rows", "count"), [(3, 32), (5, 100), (7, 257), (1, 1)])
def test_package_packs_the_same(bits: int, rows: int, count: int):
    codes = random_codes(rows, count, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, torch.Size((rows, count))), signed)


def test_strided_codes():
    codes = random_codes(64, 32, 3)
    assert torch.equal(pack_codes(codes.T, 3), pack_codes(codes.T.contiguous(), 3))
    packed = pack_codes(codes, 3)
    assert torch.equal(unpack_codes(packed.T.contiguous().T, 3, 32), codes)


def test_code_beyond_its_bits_is_refused():
    with pytest.raises(FormatError, match=r"code 8 cannot be packed\n.*3 bits hold 0 to 7"):
        pack_codes(torch.tensor([[1, 8]], dtype=torch.uint8), 3)
