"""What spans steps and belongs to no method: callbacks decide *when*."""

from callbacks.baseline import SupervisedBaseline
from callbacks.completion_writer import CompletionWriter
from callbacks.domain_pictures import DomainPictures
from callbacks.ema_teacher import EMATeacher
from callbacks.few_shot import FewShotEvaluation
from callbacks.freed_memory import KeepFreedMemory
from callbacks.linear_evaluation import LinearEvaluation
from callbacks.non_finite_guard import NonFiniteGuard, NonFiniteLoss
from callbacks.open_set import OpenSetEvaluation
from callbacks.prediction_writer import PredictionWriter
from callbacks.pseudo_label_diagnostics import PseudoLabelDiagnostics
from callbacks.pseudo_labeler import PseudoLabeler
from callbacks.run_summary import RunSummary
from callbacks.selection import SelectionEvaluation
from callbacks.swad import SWAD
from callbacks.throughput import Throughput
from callbacks.transfer_validation import TransferValidation

__all__ = [
    "SWAD",
    "CompletionWriter",
    "DomainPictures",
    "EMATeacher",
    "FewShotEvaluation",
    "KeepFreedMemory",
    "LinearEvaluation",
    "NonFiniteGuard",
    "NonFiniteLoss",
    "OpenSetEvaluation",
    "PredictionWriter",
    "PseudoLabelDiagnostics",
    "PseudoLabeler",
    "RunSummary",
    "SelectionEvaluation",
    "SupervisedBaseline",
    "Throughput",
    "TransferValidation",
]
