"""Work with a live model: prompts, answers, predictions, gradients, and the earlier model in its place."""

from surgery.live.answers import respond
from surgery.live.earlier import earlier_model
from surgery.live.losses import Distillation, distillation
from surgery.live.probing import probe
from surgery.live.prompts import load_prompts

__all__ = ["Distillation", "distillation", "earlier_model", "load_prompts", "probe", "respond"]
