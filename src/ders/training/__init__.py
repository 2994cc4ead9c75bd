"""Stages of training, as Lightning modules (floor 4: the only one that knows Lightning)."""

from ders.training.schedules import schedule
from ders.training.stages import LanguageStage, Stage, TowerStage

__all__ = ["LanguageStage", "Stage", "TowerStage", "schedule"]
