"""Names of the package; ``__init__.py`` loads them when they are first used."""

from ._version import __version__ as __version__
from .adapters import (
    AdapterBank as AdapterBank,
)
from .adapters import (
    PastAdapters as PastAdapters,
)
from .adapters import (
    TrainableView as TrainableView,
)
from .adapters import (
    add_lora as add_lora,
)
from .adapters import (
    load_adapter as load_adapter,
)
from .metrics import (
    AccuracyMatrix as AccuracyMatrix,
)
from .metrics import (
    BackwardTransfer as BackwardTransfer,
)
from .metrics import (
    GenerationScore as GenerationScore,
)
from .metrics import (
    OverallPerformance as OverallPerformance,
)
from .metrics import (
    continual_metrics as continual_metrics,
)
from .metrics import (
    generation_metrics as generation_metrics,
)
from .models import (
    LanguageModel as LanguageModel,
)
from .models import (
    TokenCrossEntropy as TokenCrossEntropy,
)
from .models import (
    create_language_model as create_language_model,
)
from .models import (
    create_text_encoder as create_text_encoder,
)
from .plugins import (
    ContrastivePlugin as ContrastivePlugin,
)
from .plugins import (
    CosineSchedulePlugin as CosineSchedulePlugin,
)
from .plugins import (
    DemonstrationsPlugin as DemonstrationsPlugin,
)
from .plugins import (
    InfLoRAPlugin as InfLoRAPlugin,
)
from .plugins import (
    KeyLossPlugin as KeyLossPlugin,
)
from .plugins import (
    L2AnchorPlugin as L2AnchorPlugin,
)
from .plugins import (
    LCBSelectorPlugin as LCBSelectorPlugin,
)
from .plugins import (
    OGDPlugin as OGDPlugin,
)
from .plugins import (
    OLoRAPlugin as OLoRAPlugin,
)
from .plugins import (
    SAPTPlugin as SAPTPlugin,
)
from .plugins import (
    SparseUpdatePlugin as SparseUpdatePlugin,
)
from .plugins import (
    TaskAdaptersPlugin as TaskAdaptersPlugin,
)
from .plugins import (
    TaskAdaptiveHeadPlugin as TaskAdaptiveHeadPlugin,
)
from .plugins import (
    TaskPromptsPlugin as TaskPromptsPlugin,
)
from .plugins import (
    TaSLPlugin as TaSLPlugin,
)
from .plugins import (
    TrainedHeadPlugin as TrainedHeadPlugin,
)
from .plugins import (
    TreeBuilderPlugin as TreeBuilderPlugin,
)
from .plugins import (
    WithinTaskLossPlugin as WithinTaskLossPlugin,
)
from .strategies import (
    L2P as L2P,
)
from .strategies import (
    OGD as OGD,
)
from .strategies import (
    SAPT as SAPT,
)
from .strategies import (
    SLCA as SLCA,
)
from .strategies import (
    DualPrompt as DualPrompt,
)
from .strategies import (
    EWCLoRA as EWCLoRA,
)
from .strategies import (
    FrozenGaussian as FrozenGaussian,
)
from .strategies import (
    FrozenNCM as FrozenNCM,
)
from .strategies import (
    FrozenRanPAC as FrozenRanPAC,
)
from .strategies import (
    GEMLoRA as GEMLoRA,
)
from .strategies import (
    HiDeLoRA as HiDeLoRA,
)
from .strategies import (
    HiDePrompt as HiDePrompt,
)
from .strategies import (
    InContext as InContext,
)
from .strategies import (
    InfLoRA as InfLoRA,
)
from .strategies import (
    L2Anchor as L2Anchor,
)
from .strategies import (
    OLoRA as OLoRA,
)
from .strategies import (
    RanPAC as RanPAC,
)
from .strategies import (
    SeqLoRA as SeqLoRA,
)
from .strategies import (
    TaSL as TaSL,
)
from .strategies import (
    TreeLoRAStrategy as TreeLoRAStrategy,
)
from .tree import (
    AdapterTree as AdapterTree,
)
