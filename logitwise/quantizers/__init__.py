"""The methods: one file each, one interface (`base.Quantizer`)."""

from logitwise.quantizers.base import Quantizer, Role
from logitwise.quantizers.flexround import FlexRound
from logitwise.quantizers.rtn import RoundToNearest
from logitwise.quantizers.signround import SignRound
from logitwise.quantizers.starts import STARTS, Start

QUANTIZERS: dict[str, type[Quantizer]] = {"flexround": FlexRound, "rtn": RoundToNearest, "signround": SignRound}

__all__ = ["QUANTIZERS", "STARTS", "Quantizer", "Role", "Start"]
