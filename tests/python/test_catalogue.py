"""What the catalogue says of agreement is what the tests compare."""

import json
import pathlib

import pytest
import test_batch_weights
import test_trl_dpo_parity
import test_trl_parity
import test_verl_parity
import tether

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ROWS = tether.objectives("policy") | tether.objectives("preference")


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
            yield f"TRL {name}"
    for case in test_verl_parity.CASES + test_verl_parity.WEIGHTED:
        if test_verl_parity.objective(case["settings"])["objective"] == row.name:
            yield f"verl {case['settings']['loss']}"
    for case in test_batch_weights.COVARIANCE:
        if test_batch_weights.covariance_terms(case)[1]["objective"] == row.name:
            yield f"verl {case['settings']['loss']}"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_agreement_is_tested(row):
    words = row.agreement.split("; ")
    assert set(words) <= set(compared_with(row))
