"""What the catalogue says of agreement is what the tests compare."""

import json
import pathlib

import pytest
import test_batch_weights
import test_checkout_parity as checkouts
import test_liger_parity as liger
import test_openrlhf_parity as openrlhf
import test_swift_parity as swift
import test_torchrl_parity as torchrl
import test_trainer_parity as trainers
import test_trl_dpo_parity
import test_trl_more_parity as trl_more
import test_trl_parity
import test_verl_parity
import test_verl_recipe_parity as verl_recipe
import tether

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ROWS = tether.objectives("policy") | tether.objectives("preference")


# What a trainer calls its loss, of the cases of a recording; what they are here.
POLICIES = [
    ("OpenRLHF", lambda s: s["options"].get("policy_loss_type", "ppo"), openrlhf.CASES,
     openrlhf.settings_of),
    ("Liger", lambda s: s["loss_type"], liger.CASES, liger.settings_of),
    ("ms-swift", lambda s: s["loss_type"], swift.CASES, swift.settings_of),
    ("Trinity", lambda s: s["loss"], trainers.TRINITY["cases"], trainers.trinity),
    ("AReaL", lambda s: "ppo" if s["gate"] is None else "decoupled, float32",
     trainers.AREAL["cases"], trainers.areal),
    ("SkyRL", lambda s: s["loss"] + (", float32" if s["loss"] not in trainers.OF_FLOAT64 else ""),
     trainers.SKYRL["cases"], trainers.skyrl),
    ("UniRL", lambda s: s["loss"], trainers.UNIRL["cases"], trainers.unirl),
    ("slime", lambda s: s["advantage_estimator"], checkouts.SLIME, checkouts.slime),
    ("ROLL", lambda s: s["variant"], checkouts.ROLL, checkouts.roll),
    ("NeMo-RL", lambda s: checkouts.nemo_name(s["options"]), checkouts.NEMO,
     lambda case: checkouts.nemo(case, penalty=False)),
    ("prime-rl", lambda s: s["loss"], checkouts.PRIME, checkouts.prime),
    ("open-instruct", lambda s: s["loss_fn"], checkouts.OPEN, checkouts.open_instruct),
    ("torchrl", lambda s: s["loss"], torchrl.RECORDING["cases"], torchrl.settings_of),
    ("TRL", lambda s: s["loss"], trl_more.ANSWERS["cases"],
     lambda case: trl_more.answers(case["settings"])),
    ("verl-recipe", lambda s: "sppo", verl_recipe.SPPO["cases"], lambda _: {"objective": "sppo"}),
]  # fmt: skip
PAIRS = [
    ("OpenRLHF", lambda s: s["loss"], openrlhf.PREFERENCE, openrlhf.preference),
    ("Liger", lambda s: s["loss_type"], liger.PREFERENCE,
     lambda case: {"objective": liger.OF_ANSWERS[case["settings"]["loss_type"]]}),
    ("Liger", lambda s: s["loss"] + ", float32", liger.HEADS, liger.of_head),
    ("TRL", lambda s: {"orpo": "orpo, float32"}.get(s["loss_type"], "CPO " + s["loss_type"]),
     trl_more.PAIRS["cases"],
     lambda case: trl_more.pairs(case["settings"])),
]  # fmt: skip
# Of the clipped surrogate, told apart by level and aggregation.
CLIPPED = {"ppo", "ppo_dual_clip", "grpo", "dapo", "bnpo", "dr_grpo", "gspo", "gspo_token", "luspo"}


def word_for(row, word, settings):
    """The word, with the level where the row has another one; None if it is another loss."""
    name, choices = settings["objective"], {}
    if name in tether.dialects():
        name, choices, _ = tether.dialects()[name][1:]
    choices = {key: each.default for key, each in ROWS[name].choices.items()} | choices | settings
    same = [choices[key] == row.choices[key].default for key in ("level", "aggregation")]
    if row.name == name:
        return word if same[0] else f"{word}, {choices['level']}"
    return word if all(same) and {row.name, name} <= CLIPPED else None


def of_trainers(row):
    for peer, name, cases, settings_of in POLICIES if row.family == "policy" else ():
        for case in cases:
            yield word_for(row, f"{peer} {name(case['settings'])}", settings_of(case))
    for peer, name, cases, settings_of in PAIRS:
        for case in cases:
            if settings_of(case)["objective"] == row.name:
                yield f"{peer} {name(case['settings'])}"
    if row.name in trainers.PRESETS:
        yield f"Trinity rec {trainers.PRESETS[row.name]}"


def compared_with(row):
    """The words of `agreement` that the tests of peers and goldens support for this row."""
    golden = json.loads((GOLDEN / f"{row.family}_golden.json").read_text())
    presets = {each["name"] for each in golden["batches"]}
    if f"{row.name} preset" in presets:
        yield "mpmath"
    for case in test_trl_parity.RECORDING["cases"] if row.family == "policy" else ():
        settings = case["settings"]
        kind, sequence = settings["loss_type"], settings["importance_sampling_level"] == "sequence"
        same = (
            all((kind == each) == (row.name == each) for each in ("cispo", "sapo", "vespo"))
            and test_trl_parity.AGGREGATIONS[kind] == row.choices["aggregation"].default
            and row.choices["level"].default == ("sequence_mean" if sequence else "token")
        )
        if same:
            yield f"TRL {kind}" + (", sequence" if sequence else "")
    for name, call in test_trl_dpo_parity.OBJECTIVES.items():
        if call["objective"] == row.name:
            yield f"TRL {name}" + (", float32" if name in test_trl_dpo_parity.OF_FLOAT32 else "")
    for case in test_verl_parity.CASES + test_verl_parity.WEIGHTED:
        if test_verl_parity.objective(case["settings"])["objective"] == row.name:
            yield f"verl {case['settings']['loss']}"
    for case in test_batch_weights.COVARIANCE:
        if test_batch_weights.covariance_terms(case)[1]["objective"] == row.name:
            yield f"verl {case['settings']['loss']}"
    yield from of_trainers(row)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_agreement_is_tested(row):
    words = row.agreement.split("; ")
    assert set(words) <= set(compared_with(row))


def test_what_is_listed_is_a_copy():
    dialect = tether.dialects()["verl.dppo_kl"]
    dialect.options["ratio_high"] = 1
    dialect.weights["kl_mask"]["high"] = 0
    tether.objectives()["ppo"].options.clear()
    tether.weights()["tv_mask"].options.clear()
    assert tether.dialects()["verl.dppo_kl"].options["ratio_high"] == 3
    assert tether.dialects()["verl.dppo_kl"].weights["kl_mask"]["high"] == 0.2
    assert "dual_clip" in tether.objectives()["ppo_dual_clip"].options
    assert "epsilon_low" in tether.objectives()["ppo"].options
    assert "high" in tether.weights()["tv_mask"].options
    tether.advantages()["gae"].options.clear()
    tether.batch_weight_rules()["kl_cov"].options.clear()
    assert "gamma" in tether.advantages()["gae"].options
    assert "share" in tether.batch_weight_rules()["kl_cov"].options
