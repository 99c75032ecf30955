"""The table: invariants, counts of PLAN 1, sharing and its inverse, errors that name the row."""

import dataclasses

import numpy as np
import pytest

from branchcore import passes, recipes, schedule
from branchcore.drawing import draw
from branchcore.plan import columns_of, from_columns
from branchcore.steps import Row, dance_sde, euler
from branchcore.tree import Tree

SG20 = schedule.shifted_linear(20, 3)
BUILDERS = {
    "branch_grpo": (recipes.branch_grpo, SG20),
    "branch_mix": (recipes.branch_mix, SG20),
    "branchcore": (recipes.branchcore, SG20),
    "dance_grpo": (recipes.dance_grpo, schedule.shifted_linear(16, 3)),
    "flow_grpo": (recipes.flow_grpo, schedule.flow_match_euler(10)),
}


def make(name, uids=(0,), **options):
    builder, sigmas = BUILDERS[name]
    return builder(sigmas, **options).plan(list(uids), seed=0, iteration=0)


@pytest.mark.parametrize(
    ("name", "options", "chains", "counts", "nodes", "waves", "widest"),
    [
        ("flow_grpo", {}, 240, (240, 216, 216, 24), 264, 10, 24),
        ("dance_grpo", {}, 192, (181, 108, None, 12), 193, 16, 12),
        ("branch_grpo", {}, 320, (203, 202, 187, 16), 219, 20, 16),
        ("branch_mix", {}, 320, (203, 34, 19, 16), 219, 20, 16),
        ("branchcore", {}, 224, (107, 30, 15, 16), 123, 14, 16),
        ("branchcore", {"tail": 1.0, "order": 1}, 320, (203, 30, 15, 16), 219, 20, 16),
    ],
)
def test_counts(name, options, chains, counts, nodes, waves, widest):
    plan = make(name, **options)
    got = plan.counts()
    for have, want in zip(got, counts, strict=True):
        assert want is None or have == want
    assert passes.unshare(plan).plan.counts().forwards == chains
    per_level = [int(plan.evaluated[lo:hi].sum()) for lo, hi in plan.levels()]
    assert (len(plan), sum(n > 0 for n in per_level), max(per_level)) == (nodes, waves, widest)


@pytest.mark.parametrize(
    ("options", "forwards", "edges"),
    [
        ({}, 203, 218),
        ({"splits": "mixed"}, 169, 184),
        ({"splits": "sparse"}, 135, 150),
        ({"splits": (9, 12, 15, 18)}, 68, 83),
        ({"branching": 3}, 928, 1008),
        ({"branching": 4}, 2813, 3068),
        ({"splits": (0, 3, 6, 9, 12)}, 315, 346),
    ],
)
def test_published_tree_sizes_golden_case_8(options, forwards, edges):
    plan = make("branch_grpo", last_step="sde", **options)
    f, e, p, leaves = plan.counts()
    assert (f, e, p) == (forwards, edges, forwards)
    assert f + leaves - 1 == e
    assert (plan.parent[1:] >= 0).all()
    assert (plan.depth[plan.parent[1:]] == plan.depth[1:] - 1).all()
    assert len(np.unique(plan.tree)) == 1


def test_mix_patterns_golden_case_18():
    plan = make("branch_mix", stride=30, window=4)
    steps = {int(d) - 1 for d in plan.depth[plan.stochastic]}
    assert steps == {0, 1, 2, 3, 6, 9}
    assert plan.counts().trained_edges == 34
    everything = make("branch_mix", stride=1, window=1)
    dense = make("branch_grpo")
    for name, column in columns_of(dense).items():
        np.testing.assert_array_equal(columns_of(everything)[name], column)
    ode = ~plan.stochastic & (plan.parent >= 0)
    np.testing.assert_array_equal(plan.row[ode][:, [0, 2, 3]], np.tile([1.0, 0, 0], (ode.sum(), 1)))
    assert not plan.train[ode].any()


@pytest.mark.parametrize("name", BUILDERS)
def test_share_undoes_unshare(name):
    plan = make(name, uids=(0, 7))
    apart = passes.unshare(plan)
    apart.plan.validate()
    again = passes.share(apart.plan)
    for field, column in columns_of(plan).items():
        np.testing.assert_array_equal(columns_of(again)[field], column)
    for field in ("sigma", "row", "stream", "prompt"):
        column = columns_of(plan)[field][apart.origin]
        np.testing.assert_array_equal(columns_of(apart.plan)[field], column)


def test_concat_and_select_are_inverse():
    one, two = make("branch_grpo"), make("dance_grpo")
    both = passes.concat([one, two])
    for prompt, plan in enumerate((one, two)):
        for field, column in columns_of(both.select([prompt])).items():
            np.testing.assert_array_equal(column, columns_of(plan)[field])
    swapped = both.select([1, 0])
    np.testing.assert_array_equal(swapped.select([1]).row, one.row)


def test_ode_siblings_collapse():
    t = Tree()
    x = t.grow(t.roots(1), 0.6, euler, children=5)
    kids = t.grow(x, 0.3, dance_sde(0.3), train=True)
    t.leaf(t.grow(kids, 0.0, euler))
    assert [hi - lo for lo, hi in t.plan().levels()] == [1, 1, 5, 5]
    assert [hi - lo for lo, hi in t.plan(merge=False).levels()] == [1, 5, 5, 5]


def test_a_last_bit_of_sigma_only_loses_sharing():
    t = Tree()
    root = t.roots(1)
    a, b = t.grow(root, 0.5, euler), t.grow(root, np.nextafter(0.5, 1), euler)
    for x in (a, b):
        t.leaf(t.grow(t.grow(x, 0.2, dance_sde(0.3), train=True), 0.0, euler))
    assert t.plan().counts().forwards == 5


def test_unscored_noise_is_dead():
    t = Tree()
    x = t.grow(t.roots(1), 0.5, dance_sde(0.3), children=3, train=True)
    t.leaf(t.grow(x[:2], 0.0, euler))
    t.grow(x, 0.2, dance_sde(0.3), train=True)
    plan = t.plan()
    assert plan.counts() == (3, 2, 1, 2)


def test_dance_subset_is_per_sample_and_pure():
    plans = [make("dance_grpo", uids=(u,)) for u in (3, 4, 3)]
    np.testing.assert_array_equal(plans[0].train, plans[2].train)
    assert (plans[0].train != plans[1].train).any()
    plan = plans[0]
    head = np.where(plan.depth == 1, np.arange(len(plan)), -1)
    for lo, hi in plan.levels()[2:]:
        head[lo:hi] = head[plan.parent[lo:hi]]
    assert {int(n) for n in np.bincount(head[plan.train])[1:13]} == {9}


def test_updates_are_dealt_by_sample():
    plan = make("dance_grpo", updates=3)
    assert plan.num_updates == 3
    assert [len(plan.trained(u)) for u in range(3)] == [36, 36, 36]
    first = plan.counts().trained_parents
    assert first >= make("dance_grpo").counts().trained_parents


def test_branch_edges_are_dealt_at_random_and_equally():
    recipe = recipes.branch_grpo(SG20, updates=18)
    plans = [recipe.plan([7, 8], seed=0, iteration=i) for i in (0, 0, 1)]
    np.testing.assert_array_equal(plans[0].update, plans[1].update)
    assert (plans[0].update != plans[2].update).any()
    sizes = [len(plans[0].trained(u)) for u in range(18)]
    assert sum(sizes) == 404
    assert max(sizes) - min(sizes) <= 2
    assert plans[0].counts().trained_parents > 374
    with pytest.raises(ValueError, match=r"num_updates must be in 1..202, .* got 203"):
        recipes.branch_grpo(SG20, updates=203).plan([0], seed=0, iteration=0)


def test_a_recipe_may_depend_on_the_iteration_unless_it_says_not():
    def grow(tree, at):
        x = tree.grow(tree.roots(2), 0.5, dance_sde(0.3), train=True, label=at.iteration)
        tree.leaf(tree.grow(x, 0.0, euler), label=at.iteration)

    recipe = recipes.Recipe(name="window", grow=grow, credit=None, objective=None)
    assert [recipe.plan([0], seed=0, iteration=i).label.max() for i in (0, 5)] == [0, 5]


@pytest.mark.parametrize("name", BUILDERS)
def test_recipes_remember_their_options(name):
    builder, sigmas = BUILDERS[name]
    recipe = builder(sigmas, kl=0.25)
    assert recipe.options["kl"] == 0.25
    assert recipe.options["sigmas"] == list(sigmas)
    assert set(recipe.options) == {"sigmas", *recipes.options_of(name)}
    with pytest.raises(TypeError, match=f"{name}: kl must be float, got 'a'"):
        recipes.build(name, sigmas, kl="a")


def corrupt(plan, **changes):
    columns = {k: v.copy() for k, v in columns_of(plan).items()}
    for name, (index, value) in changes.items():
        columns[name][index] = value
    return dataclasses.replace(plan, **columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent": (5, 7)}, r"row 6 .*parents must be sorted, got 4"),
        ({"parent": (218, 218)}, r"row 218 .*parent must be an earlier row or -1, got 218"),
        ({"parent": (40, 0)}, r"row 40 .*parents must be sorted, got 0"),
        ({"row": ((9, 1), -0.05)}, r"row 9 .*a \(1 - sigma_p\) - b \+ c \+ d must be 1 - sigma"),
        ({"row": ((9, 0), np.nan)}, r"row 9 .*must be finite"),
        ({"row": ((9, 3), 0.0)}, r"row 9 .*\(a sigma_p \+ b\)\^2 \+ s\^2 must be >= sigma\^2"),
        ({"row": ((203, 3), 0.5)}, r"row 203 .*own stream must be set exactly where s > 0, got -1"),
        ({"sigma": (9, 1.5)}, r"row 9 .*sigma must be in \[0, 1\], got 1.5"),
        ({"sigma": (9, 1.0)}, r"row 9 .*sigma must decrease along an edge with b != 0, got 1.0"),
        ({"train": (0, True)}, r"row 0 .*a trained edge must have a parent"),
        ({"train": (218, True)}, r"row 218 .*a trained edge must have s > 0, got 0.0"),
        ({"update": (9, -1)}, r"row 9 .*update must be >= 0, got -1"),
        ({"leaf": (218, False)}, r"row 58 .*a trained edge must have a leaf below it, got 0"),
        ({"leaf": (100, True)}, r"row 100 .*a leaf must be at sigma 0"),
        ({"stream": ((1, 1), -1)}, r"row 1 .*shared stream must be set exactly .*, got -1"),
        ({"prompt": (218, 1)}, r"row 218 .*a tree must stay in one prompt"),
    ],
)
def test_tampered_plans_name_the_row(changes, message):
    with pytest.raises(ValueError, match=message):
        corrupt(make("branch_grpo"), **changes).validate()


def test_row_check_sees_a_tenth_of_a_percent():
    plan = make("branch_grpo")
    b = plan.row[30, 1]
    with pytest.raises(ValueError, match="row 30"):
        corrupt(plan, row=((30, 1), b * 1.001)).validate()


def test_noise_may_not_get_lost():
    t = Tree()

    def quiet(_prev, sigma, after):
        return Row(0.3, 0.3 * (1 - sigma) - (1 - after), 0.0, 1e-3)

    t.leaf(t.grow(t.grow(t.roots(1), 0.5, quiet, children=2), 0.0, euler))
    with pytest.raises(ValueError, match=r"\^2 must be >= sigma\^2"):
        t.plan()


def test_plans_that_cannot_run():
    t = Tree()
    with pytest.raises(ValueError, match="tree must have nodes, got none"):
        t.plan()
    x = t.roots(1)
    with pytest.raises(ValueError, match="tree must have leaves, got none"):
        t.plan()
    t.leaf(t.grow(t.grow(x, 0.5, dance_sde(0.3), train=True), 0.0, euler))
    with pytest.raises(ValueError, match="a trained prompt must have at least 2 leaves, got 1"):
        t.plan()
    t = Tree()
    t.leaf(t.grow(t.grow(t.roots(2), 0.5, euler, train=True), 0.0, euler))
    with pytest.raises(ValueError, match=r"a trained edge must have s > 0, got 0\.0"):
        t.plan()
    t = Tree()
    t.leaf(t.grow(t.grow(t.roots(2), 0.5, euler), 0.7, euler))
    with pytest.raises(
        ValueError, match=r"sigma must decrease along an edge with b != 0, got 0\.7"
    ):
        t.plan(noisy_leaves=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: recipes.branch_grpo(SG20, splits=(0, 3, 25)), r"got \(0, 3, 25\)"),
        (lambda: recipes.branch_grpo(SG20, splits=(0, 19)), "distinct steps in 0..18"),
        (lambda: recipes.branch_mix(SG20, splits=(3, 3)), "splits must be distinct steps"),
        (lambda: recipes.branchcore(SG20, branching=1), "branching must make at least 2 leaves"),
        (lambda: recipes.branchcore(SG20[::-1]), "sigmas must decrease from 1 to 0"),
        (lambda: recipes.branch_grpo(SG20, splits="denser"), "preset must be from"),
        (lambda: recipes.branch_grpo(SG20, pruning="half"), "pruning must be from"),
        (lambda: recipes.branch_grpo(SG20, last_step="ode"), "last_step must be 'euler' or 'sde'"),
        (lambda: recipes.dance_grpo(SG20, fraction=0.01), "fraction must select 1 to 19 steps"),
        (lambda: recipes.build("grpo", SG20), "name must be from .*got 'grpo'"),
        (lambda: recipes.build("flow_grpo", SG20, splits=(1,)), r"options must .*\['splits'\]"),
        (lambda: recipes.dance_grpo(SG20, updates=0), r"updates must be in 1..12, got 0"),
        (lambda: recipes.dance_grpo(SG20, group=4, updates=20), r"updates must be in 1..4, got 20"),
        (lambda: recipes.branch_grpo(SG20, updates=-1), r"updates must be at least 1, got -1"),
    ],
)  # fmt: skip
def test_recipes_refuse_what_cannot_run(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_group_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 leaves, got 1"):
        make("dance_grpo", group=1)


def test_rows_in_any_order_sort_to_the_same_plan(rng):
    plan = make("branch_mix", uids=(0, 1))
    order = rng.permutation(len(plan))
    rank = np.argsort(order)
    columns = {k: v[order] for k, v in columns_of(plan).items()}
    columns["parent"] = np.where(columns["parent"] >= 0, rank[columns["parent"]], -1)
    again = from_columns(columns).plan.validate()
    assert again.counts() == plan.counts()
    assert sorted(map(tuple, again.row)) == sorted(map(tuple, plan.row))


def test_drawing_folds_runs_and_equal_siblings():
    text = draw(make("branchcore", splits=(0, 3), tail=1.0, order=1))
    assert text.startswith("75 nodes, 71 forwards, 6 trained edges of 3 parents, 4 leaves")
    assert "`- 2 of ~* " in text
    assert text.count("leaf") == 1
    t = Tree()
    x = t.grow(t.roots(1), 0.5, dance_sde(0.3), children=3, train=[True, False, True])
    t.leaf(t.grow(x, 0.0, euler))
    assert draw(t.plan()).splitlines()[1:] == [
        "o 1",
        "|- 2 of ~* 0.5",
        "|  `- - 0 leaf",
        "`- ~ 0.5",
        "   `- - 0 leaf",
    ]
