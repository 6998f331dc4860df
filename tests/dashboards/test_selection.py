"""A link restores the view, whatever the view is; what cannot be read falls back with a note."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lens_dashboards.selection import OPTIONS, Selection, read_url

from lens.traces.metrics import METRICS, VARIANTS

ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda text: text.strip("/. ") == text and text
)
prompts = st.just("") | st.from_regex(r"p[0-9]{3}", fullmatch=True)
small = st.integers(0, 10**6)
ranges = st.tuples(small, st.integers(1, 10**6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
windows = st.none() | st.tuples(ranges, ranges).map(lambda two: (*two[0], *two[1]))

variants = st.sampled_from(VARIANTS)
overviews = st.builds(
    lambda view, metric, group: view.where(metric=metric, group=group),
    st.builds(Selection, page=st.just("overview"), run=ids, variant=variants),
    st.sampled_from(list(METRICS)),
    prompts | st.sampled_from(["text", "copied"]),
)
heads = st.builds(
    Selection,
    page=st.just("head"),
    run=ids,
    variant=variants,
    layer=st.integers(0, 200),
    head=st.integers(0, 200),
    prompt=prompts,
    window=windows,
    query=st.none() | small,
)
analyses = st.builds(Selection, page=st.just("analysis"), run=ids, section=ids, variant=variants)
atlases = st.builds(Selection, page=st.just("atlas"), run=ids, prompt=prompts, variant=variants)


def with_options(page, **more):
    values = {name: st.none() | st.text(min_size=1, max_size=12) for name in OPTIONS[page]}
    chosen = st.fixed_dictionaries(values).map(
        lambda found: {name: value for name, value in found.items() if value is not None}
    )
    return st.builds(
        lambda view, found: view.where(**found),
        st.builds(Selection, page=st.just(page), variant=variants, **more),
        chosen,
    )


configured = st.one_of(
    with_options("compare"),
    *(with_options(page, run=ids) for page in ("heads", "sinks", "redistribution", "circuits")),
    with_options("head", run=ids, layer=small, head=small),
)
others = st.just(Selection()) | st.builds(Selection, page=st.just("provenance"), run=ids)


@given(overviews | heads | atlases | analyses | configured | others)
def test_a_link_restores_its_view(view):
    path, _, search = view.url().partition("?")
    assert read_url(path, search) == (view, [])


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_link_breaks_the_reader(path, search):
    view, notes = read_url(path, search)
    assert view is None or isinstance(view, Selection)
    assert all(isinstance(note, str) for note in notes)


@pytest.mark.parametrize(
    ("url", "expected", "note"),
    [
        ("/run/a?metric=nonsense", Selection("overview", "a"), "no metric 'nonsense'"),
        ("/run/a?variant=cooked", Selection("overview", "a"), "no variant 'cooked'"),
        ("/run/a/circuits?variant=x", Selection("circuits", "a"), "no variant 'x'"),
        ("/run/a/head/1/2?q0=5&q1=5&k0=0&k1=3", Selection("head", "a", layer=1, head=2), "zoom"),
        ("/run/a/head/1/2?q0=5", Selection("head", "a", layer=1, head=2), "zoom"),
        ("/run/a/head/1/2?query=x", Selection("head", "a", layer=1, head=2), "no query 'x'"),
    ],
)
def test_what_cannot_be_read_falls_back_with_a_note(url, expected, note):
    path, _, search = url.partition("?")
    view, notes = read_url(path, search)
    assert view == expected
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize("path", ["/other", "/run", "/run/a/head/x/1", "/run/a/head/1", "/run/a/b"])
def test_what_is_no_page_is_none(path):
    assert read_url(path) == (None, [])


def test_another_prompt_keeps_the_pin_and_drops_the_zoom_of_the_old_one():
    view, _ = read_url("/run/a/head/1/2", "prompt=p000&q0=3&q1=9&k0=0&k1=6&query=5&pin=0.1")
    assert view is not None
    after = view.where(prompt="p001")
    assert after.option("pin") == "0.1"
    assert (after.prompt, after.window, after.query) == ("p001", None, None)
    assert view.where(prompt="p000") == view


@given(st.sampled_from(["heads", "atlas", "sinks", "circuits", "provenance"]), variants)
def test_pages_of_a_run_keep_whether_the_first_token_counts(page, variant):
    view = Selection("head", "a", variant=variant, layer=3, options=(("pin", "0.1"),))
    for after in (view.to(page), view.to(page).to_head(2, 5), view.to("analysis", "roles")):
        assert (after.run, after.variant) == ("a", variant)
        assert read_url(*after.url().partition("?")[::2]) == (after, [])
