"""All methods by the name a recipe uses. Adding one is one file and one line here."""

from __future__ import annotations

METHODS = {
    "pretrain": "stepdistill.methods.pretrain:Pretrain",
    "lcm": "stepdistill.methods.lcm:LCM",
    "dmd2": "stepdistill.methods.dmd2:DMD2",
    "compose": "stepdistill.methods.base:Compose",
}
