"""All methods by the name a recipe uses. Adding one is one file and one line here."""

from __future__ import annotations

from stepdistill.registry import Table

METHODS = Table(
    "stepdistill.methods.base:Method",
    {
        "pretrain": "stepdistill.methods.pretrain:Pretrain",
        "lcm": "stepdistill.methods.lcm:LCM",
        "cd": "stepdistill.methods.cd:CD",
        "ect": "stepdistill.methods.ect:ECT",
        "tscd": "stepdistill.methods.tscd:TSCD",
        "scm": "stepdistill.methods.scm:SCM",
        "meanflow": "stepdistill.methods.meanflow:MeanFlow",
        "imf": "stepdistill.methods.imf:IMF",
        "dmf": "stepdistill.methods.dmf:DMF",
        "anyflow": "stepdistill.methods.anyflow:AnyFlow",
        "dmd2": "stepdistill.methods.dmd2:DMD2",
        "ladd": "stepdistill.methods.ladd:LADD",
        "sim": "stepdistill.methods.sim:SIM",
        "sid": "stepdistill.methods.sid:SiD",
        "sida": "stepdistill.methods.sida:SiDA",
        "diff_instruct": "stepdistill.methods.diff_instruct:DiffInstruct",
        "f_distill": "stepdistill.methods.f_distill:FDistill",
        "vsd": "stepdistill.methods.vsd:VSD",
        "dmd": "stepdistill.methods.dmd:DMD",
        "decoupled_dmd": "stepdistill.methods.decoupled_dmd:DecoupledDMD",
        "cdm": "stepdistill.methods.cdm:CDM",
        "phased_dmd": "stepdistill.methods.phased_dmd:PhasedDMD",
        "twinflow": "stepdistill.methods.twinflow:TwinFlow",
        "rdm": "stepdistill.methods.rdm:RDM",
        "kd": "stepdistill.methods.kd:KD",
        "boot": "stepdistill.methods.boot:BOOT",
        "progressive": "stepdistill.methods.progressive:Progressive",
        "disback": "stepdistill.methods.disback:DisBack",
        "lightning": "stepdistill.methods.lightning:Lightning",
        "reward": "stepdistill.methods.reward:Reward",
        "add": "stepdistill.methods.add:ADD",
        "tsm": "stepdistill.methods.tsm:TSM",
        "compose": "stepdistill.methods.compose:Compose",
    },
)

# For autoregressive models of codes (`Family.of_codes`), which no other method serves; no part of a composition.
CODE_METHODS = Table(
    "stepdistill.methods.base:Method",
    {"dd1": "stepdistill.methods.dd1:DD1", "dd2": "stepdistill.methods.dd2:DD2"},
)

# What makes a network smaller, where it has lists of blocks, and heals it: no part of a composition, and what is left is a teacher.
PRUNERS = Table(
    "stepdistill.methods.base:Method",
    {"ppcl": "stepdistill.methods.ppcl:PPCL", "output_kd": "stepdistill.methods.output_kd:OutputKD"},
)

# All that a recipe may name.
EVERY_METHOD = Table(METHODS.base, METHODS | CODE_METHODS | PRUNERS)
