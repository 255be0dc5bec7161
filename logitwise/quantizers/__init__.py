"""The methods: one file each, one interface (`base.Quantizer`)."""

from logitwise.quantizers.base import Quantizer, Role
from logitwise.quantizers.block_ap import BlockAP
from logitwise.quantizers.flexround import FlexRound
from logitwise.quantizers.gsq import GumbelSoftmax
from logitwise.quantizers.informed import INFORMED, InformedStart
from logitwise.quantizers.lrq import LowRank
from logitwise.quantizers.lwc import LearnableClipping
from logitwise.quantizers.reopened import Reopened
from logitwise.quantizers.rtn import RoundToNearest
from logitwise.quantizers.signround import SignRound
from logitwise.quantizers.starts import STARTS, Start

QUANTIZERS: dict[str, type[Quantizer]] = {
    "block_ap": BlockAP,
    "flexround": FlexRound,
    "gsq": GumbelSoftmax,
    "lrq": LowRank,
    "lwc": LearnableClipping,
    "rtn": RoundToNearest,
    "signround": SignRound,
}

__all__ = ["INFORMED", "QUANTIZERS", "STARTS", "InformedStart", "Quantizer", "Reopened", "Role", "Start"]
