"""Evaluation: a model's accuracy by family of questions, and its loyalty to the uncompressed model."""

from laco.evaluate.generation import Answers, answer, prompt
from laco.evaluate.report import FamilyScore, Report, evaluate

__all__ = ["Answers", "FamilyScore", "Report", "answer", "evaluate", "prompt"]
