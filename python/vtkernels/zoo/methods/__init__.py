"""The published methods, one file each: all that is known about a method (formula, defaults, deviations) is there."""

from vtkernels.zoo.methods.aim import AIM
from vtkernels.zoo.methods.auroracap import AuroraCap
from vtkernels.zoo.methods.baselines import Random, Uniform
from vtkernels.zoo.methods.bvllm import BVLLM
from vtkernels.zoo.methods.centerclip import CenterCLIP
from vtkernels.zoo.methods.dynamic_llava import DynamicLLaVA
from vtkernels.zoo.methods.fastervlm import FasterVLM
from vtkernels.zoo.methods.fopru import FoPru
from vtkernels.zoo.methods.hiprune import HiPrune
from vtkernels.zoo.methods.holitom import HoliTom
from vtkernels.zoo.methods.kivi import KIVI
from vtkernels.zoo.methods.kvquant import KVQuant
from vtkernels.zoo.methods.lookm import LookM
from vtkernels.zoo.methods.mmtok import MMTok
from vtkernels.zoo.methods.packed import Packed
from vtkernels.zoo.methods.pitome import PiToMe
from vtkernels.zoo.methods.recoverable_compression import RecoverableCompression
from vtkernels.zoo.methods.simvlg import SimVLG
from vtkernels.zoo.methods.sit import SiT
from vtkernels.zoo.methods.stc import STCCacher, STCPruner
from vtkernels.zoo.methods.tinychart import TinyChart
from vtkernels.zoo.methods.todre import ToDRE
from vtkernels.zoo.methods.tome import ToMe
from vtkernels.zoo.methods.vflowopt import VFlowOpt
from vtkernels.zoo.methods.video_xl2 import VideoXL2
from vtkernels.zoo.methods.vidkv import VidKV
from vtkernels.zoo.methods.visiondrop import VisionDrop
from vtkernels.zoo.methods.vtc_cls import VtcCls
from vtkernels.zoo.methods.zipvl import ZipVL

RECIPES = (
    FasterVLM,
    VtcCls,
    FoPru,
    HiPrune,
    ToDRE,
    MMTok,
    ToMe,
    PiToMe,
    TinyChart,
    AuroraCap,
    SimVLG,
    AIM,
    VisionDrop,
    VFlowOpt,
    RecoverableCompression,
    SiT,
    HoliTom,
    BVLLM,
    CenterCLIP,
    STCCacher,
    STCPruner,
    KIVI,
    VidKV,
    ZipVL,
    KVQuant,
    LookM,
    VideoXL2,
    DynamicLLaVA,
    Packed,
    Random,
    Uniform,
)
