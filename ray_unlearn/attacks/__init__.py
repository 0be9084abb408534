"""Attacks: what a model still gives away of what it was to forget. No command runs them yet."""

from __future__ import annotations

from ray_unlearn.attacks import prefix
from ray_unlearn.attacks.table import Attack, AttackResult, Findings
from ray_unlearn.tables import Table

ATTACKS = Table("attack", Attack, {"prefix": prefix.ATTACK})

__all__ = ["ATTACKS", "Attack", "AttackResult", "Findings"]
