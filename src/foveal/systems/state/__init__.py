"""Linear attention, recurrent states, and what else is linear in the length."""

from foveal.systems.base import System
from foveal.systems.state.features import (
    BASED,
    COSFORMER,
    COTTENTION,
    DIJIANG,
    FASTMAX,
    FF_KERNEL_ATTENTION,
    KERNEL_ATTENTION_ADVISOR,
    KERNELIZED_TRANSFORMER,
    L2VIT,
    NALA,
    NPRF_RPE,
    PERFORMER,
)
from foveal.systems.state.hybrids import SALA
from foveal.systems.state.others import PONET, RAT, SET_TRANSFORMER, SOFT, TLINFORMER
from foveal.systems.state.recurrences import (
    GATED_DELTANET,
    KDA,
    LIGHTNING_ATTENTION,
    LIGHTNING_ATTENTION_2,
    MLSTM_SYSTEM,
    TFLA,
    TITANS_MEMORY,
    TRANSNORMER,
    TRANSNORMER_LLM,
)

SYSTEMS: tuple[System, ...] = (
    KDA,
    GATED_DELTANET,
    LIGHTNING_ATTENTION,
    LIGHTNING_ATTENTION_2,
    MLSTM_SYSTEM,
    TFLA,
    TRANSNORMER,
    TRANSNORMER_LLM,
    TITANS_MEMORY,
    SALA,
    BASED,
    PERFORMER,
    COSFORMER,
    COTTENTION,
    DIJIANG,
    FASTMAX,
    NALA,
    L2VIT,
    KERNELIZED_TRANSFORMER,
    FF_KERNEL_ATTENTION,
    NPRF_RPE,
    KERNEL_ATTENTION_ADVISOR,
    SOFT,
    SET_TRANSFORMER,
    PONET,
    RAT,
    TLINFORMER,
)
