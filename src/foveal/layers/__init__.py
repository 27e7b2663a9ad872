"""The distinctive layers of whole-network papers, as nn.Modules."""

from torch.nn import Module

from foveal._options import checked
from foveal.layers.atoms import NeighbourAttention
from foveal.layers.causal import CausalAttention, LatentAttention
from foveal.layers.compressed import CompressedConvolutionalAttention
from foveal.layers.condensed import TLinFormerBlock
from foveal.layers.convolution import (
    DepthwiseConvolution,
    InceptionConvolution,
    LargeKernelAttention,
    VANAttention,
    VANBlock,
)
from foveal.layers.convolution_dynamic import (
    ContextMixing,
    DynamicConvolution,
    LightweightConvolution,
)
from foveal.layers.convolution_generated import (
    AttentionRefiningKernel,
    AttentiveConvolution,
    CoordinateNetwork,
    DeformableConvolution,
    HyperProduct,
)
from foveal.layers.convolution_long import FrequencyFilter, LongConvolution, OversizeConvolution
from foveal.layers.convolution_merge import (
    DilatedBranches,
    LargeKernelBranches,
    RepLKBlock,
    UniRepLKBlock,
    merge,
)
from foveal.layers.convolution_orders import MultiorderMixer, WaveMixer
from foveal.layers.convolution_selective import (
    KernelSelection,
    LargeKernelPyramid,
    LargeSeparableKernelAttention,
    SelectiveKernelAttention,
    SeparableKernelAttention,
)
from foveal.layers.cross_axis import CrossAxisAttention
from foveal.layers.delta import GatedDeltaNet, KimiDeltaAttention
from foveal.layers.diagonal import DiagonalAttention
from foveal.layers.factorised_axes import FactorisedAxesAttention
from foveal.layers.feature_attention import (
    AdvisorAttention,
    BasedAttention,
    CosFormerAttention,
    CottentionLayer,
    DiJiangAttention,
    FastAttention,
    FeatureAttention,
    FeedForwardKernelAttention,
    PerformerAttention,
    SpectralAttention,
)
from foveal.layers.gated_window import GatedWindowAttention
from foveal.layers.groups import BoxAttention, HierarchicalAttention, ScaleAttention
from foveal.layers.heads import MultiHead
from foveal.layers.hybrid import (
    HybridStack,
    StackState,
    kimi_linear_stack,
    sparse_linear_stack,
)
from foveal.layers.inducing import InducedSetAttention, SetAttentionBlock, SetPooling
from foveal.layers.landmarks import SOFTAttention
from foveal.layers.lightning import (
    DiagAttention,
    LightningAttention,
    NormAttention,
    TransNormerBlock,
    TransNormerLLMBlock,
)
from foveal.layers.local_linear import LocalLinearAttention, ParallaxAttention
from foveal.layers.low_rank import LowRankAttention
from foveal.layers.mlstm import MLSTMLayer
from foveal.layers.native_sparse import (
    LinearCompression,
    MeanCompression,
    MLPCompression,
    NativeSparseAttention,
)
from foveal.layers.neighborhood import MedViTAttention, NeighborhoodAttention
from foveal.layers.pooling import PoNetMixer
from foveal.layers.published import (
    load_gated_delta_net,
    load_kimi_delta_attention,
    load_latent_attention,
)
from foveal.layers.rat import RATAttention
from foveal.layers.relative import KernelisedRelativeAttention
from foveal.layers.sequence import ChunkedEncoder, SparseTransformerAttention
from foveal.layers.shards import ShardedAttention
from foveal.layers.shared_projection import HeadEmbeddingAttention, SlicedAttention
from foveal.layers.sphere import SphereAttention
from foveal.layers.state import LayerState, ShortConvolution, StateLayer
from foveal.layers.titans import TitansMAC, TitansMAG, TitansMAL, TitansMemory
from foveal.layers.trainable_sparse_blocks import (
    PyramidSparseAttention,
    SparseLinearAttention,
)
from foveal.layers.trainable_sparse_depth import (
    LessTokens,
    block_information,
    information_loss,
)
from foveal.layers.trainable_sparse_gates import (
    NosaImportance,
    SeerGate,
    block_targets,
    distil_gate,
    gate_loss,
)
from foveal.layers.trainable_sparse_maps import (
    SeaMap,
    SparseLinearMapAttention,
    map_loss,
    map_targets,
)
from foveal.layers.trainable_sparse_means import MeanBlockAttention
from foveal.layers.trainable_sparse_spans import (
    CoreContextAttention,
    MonarchAttention,
    PolarAttention,
    SparseKAttention,
    SuperlinearAttention,
    router_loss,
)
from foveal.layers.trainable_sparse_tokens import (
    EvictionRouter,
    drop_tokens,
    representation_shift,
    sparse_k,
)
from foveal.layers.trainable_sparse_types import NeuralAttentionSearch
from foveal.layers.units import GatedUnits
from foveal.layers.vision_linear import L2ViTAttention, NaLaAttention
from foveal.layers.windows import AxialAttention, DilatedWindowAttention, SwinWindowAttention

__all__ = [
    "AdvisorAttention",
    "AttentionRefiningKernel",
    "AttentiveConvolution",
    "AxialAttention",
    "BasedAttention",
    "BoxAttention",
    "CausalAttention",
    "ChunkedEncoder",
    "CompressedConvolutionalAttention",
    "ContextMixing",
    "CoordinateNetwork",
    "CoreContextAttention",
    "CosFormerAttention",
    "CottentionLayer",
    "CrossAxisAttention",
    "DeformableConvolution",
    "DepthwiseConvolution",
    "DiJiangAttention",
    "DiagAttention",
    "DiagonalAttention",
    "DilatedBranches",
    "DilatedWindowAttention",
    "DynamicConvolution",
    "EvictionRouter",
    "FactorisedAxesAttention",
    "FastAttention",
    "FeatureAttention",
    "FeedForwardKernelAttention",
    "FrequencyFilter",
    "GatedDeltaNet",
    "GatedUnits",
    "GatedWindowAttention",
    "HeadEmbeddingAttention",
    "HierarchicalAttention",
    "HybridStack",
    "HyperProduct",
    "InceptionConvolution",
    "InducedSetAttention",
    "KernelSelection",
    "KernelisedRelativeAttention",
    "KimiDeltaAttention",
    "L2ViTAttention",
    "LargeKernelAttention",
    "LargeKernelBranches",
    "LargeKernelPyramid",
    "LargeSeparableKernelAttention",
    "LatentAttention",
    "LayerState",
    "LessTokens",
    "LightningAttention",
    "LightweightConvolution",
    "LinearCompression",
    "LocalLinearAttention",
    "LongConvolution",
    "LowRankAttention",
    "MLPCompression",
    "MLSTMLayer",
    "MeanBlockAttention",
    "MeanCompression",
    "MedViTAttention",
    "MonarchAttention",
    "MultiHead",
    "MultiorderMixer",
    "NaLaAttention",
    "NativeSparseAttention",
    "NeighborhoodAttention",
    "NeighbourAttention",
    "NeuralAttentionSearch",
    "NormAttention",
    "NosaImportance",
    "OversizeConvolution",
    "ParallaxAttention",
    "PerformerAttention",
    "PoNetMixer",
    "PolarAttention",
    "PyramidSparseAttention",
    "RATAttention",
    "RepLKBlock",
    "SOFTAttention",
    "ScaleAttention",
    "SeaMap",
    "SeerGate",
    "SelectiveKernelAttention",
    "SeparableKernelAttention",
    "SetAttentionBlock",
    "SetPooling",
    "ShardedAttention",
    "ShortConvolution",
    "SlicedAttention",
    "SparseKAttention",
    "SparseLinearAttention",
    "SparseLinearMapAttention",
    "SparseTransformerAttention",
    "SpectralAttention",
    "SphereAttention",
    "StackState",
    "StateLayer",
    "SuperlinearAttention",
    "SwinWindowAttention",
    "TLinFormerBlock",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansMemory",
    "TransNormerBlock",
    "TransNormerLLMBlock",
    "UniRepLKBlock",
    "VANAttention",
    "VANBlock",
    "WaveMixer",
    "block_information",
    "block_targets",
    "distil_gate",
    "drop_tokens",
    "gate_loss",
    "information_loss",
    "kimi_linear_stack",
    "load_gated_delta_net",
    "load_kimi_delta_attention",
    "load_latent_attention",
    "map_loss",
    "map_targets",
    "merge",
    "representation_shift",
    "router_loss",
    "sparse_k",
    "sparse_linear_stack",
]

for _name in __all__:
    _layer = globals()[_name]
    if isinstance(_layer, type) and issubclass(_layer, Module):
        checked(_layer)
