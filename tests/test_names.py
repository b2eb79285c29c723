from carve.names import FEW, hint


def test_the_nearest_name_or_all_of_them():
    assert hint("gnd2", ["gdn2", "kda"]) == "; did you mean 'gdn2'?"
    assert hint(3, {"gdn2": 0, "kda": 1}) == "; expected one of gdn2, kda"
    assert hint("zzz", [f"name{i}" for i in range(FEW + 1)]) == ""
