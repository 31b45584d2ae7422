"""What a person sees of a plan: the terminal's report and the page, of whole and of poor plans."""

import copy
import html.parser
import itertools
import re

import pytest
import sample_plan

from bigjax.plan.report import charts, forms, ranking
from bigjax.plan.report.page import write_page
from bigjax.plan.report.sections import sections
from bigjax.plan.report.terminal import show

PLANS = ('plan', 'fast', 'too_large')
VOID = {'meta', 'line', 'rect', 'br'}  # elements without an end, of those that the page uses


class Reader(html.parser.HTMLParser):
    """Reads a page: its text, its elements, what it loads, and whether they nest."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID or tag == 'rect':
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.seen if name == tag]


def read(plan, tmp_path):
    """Returns the page of a plan, read."""
    text = write_page(plan, tmp_path / 'plan.html').read_text('utf-8')
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return text, reader


@pytest.mark.parametrize('name', PLANS)
def test_page_loads_nothing(tmp_path, monkeypatch, name):
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')  # the template is found from any folder
    text, page = read(getattr(sample_plan, name)(), tmp_path)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {'script', 'link', 'img', 'iframe', 'object', 'use', 'image'}
    assert not re.search(r'https?:|url\(|@import|src=|javascript:', text)
    assert not [attrs for _, attrs in page.seen if attrs.get('href')]


@pytest.mark.parametrize('name', PLANS)
def test_page_is_accessible(tmp_path, name):
    text, page = read(getattr(sample_plan, name)(), tmp_path)
    assert page.all('html') == [{'lang': 'en'}]
    assert len(page.all('h1')) == 1
    identifiers = [attrs['id'] for _, attrs in page.seen if 'id' in attrs]
    assert len(identifiers) == len(set(identifiers))
    for picture in page.all('svg'):
        assert picture['role'] == 'img'
        assert set(picture['aria-labelledby'].split()) <= set(identifiers)
    assert all(cell['scope'] in ('row', 'col') for cell in page.all('th'))
    assert 'prefers-color-scheme: dark' in text
    # Every colour that is drawn has a rule, in light and in dark.
    for colour in {attrs['class'] for attrs in page.all('rect')}:
        assert f'rect.{colour} {{' in text
        assert text.count(f'--{colour}:') == 2


@pytest.mark.parametrize('name', PLANS)
def test_page_and_terminal_say_the_same(tmp_path, name):
    plan = getattr(sample_plan, name)()
    _, page = read(plan, tmp_path)
    words = ' '.join(' '.join(page.text).split())
    report = ' '.join(show(plan).split())
    for section in sections(plan):
        cells = [cell for row in (section.head, *section.rows) for cell in row]
        for text in (section.title, *sum(section.facts, ()), *cells, *section.notes):
            assert text in words
            assert text in report


def leaves(tree, path=()):
    """Yields the path of every number of a JSON object."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, (*path, index))
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield path


def changed(plan, path):
    """Returns the plan with one number half as large again."""
    plan = copy.deepcopy(plan)
    tree = plan
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = type(tree[path[-1]])(tree[path[-1]] * 1.5 + (tree[path[-1]] == 0) * 7)
    return plan


# Told in another way: the middle by its ends; rates of links by seconds; an item by its sum.
ELSEWHERE = re.compile(
    r'chip/(?!hbm_bytes$)|predicted_step_seconds/middle|^tokens_per_second|mfu/middle|slices|'
    r'kernels/\w+/flops|closed_form/(?!memory/bytes|predicted|efficiency)|mesh/(?!fsdp)|'
    r'search/\d+/predicted_step_seconds/middle|search/5/|search/\d+/timeline/\w+/(other|hidden)|'
    r'price_per_chip_hour'
)  # fmt: skip


def test_every_number_is_told():
    plan = sample_plan.plan()
    report = show(plan)
    paths = list(leaves(plan))
    untold = ['/'.join(map(str, p)) for p in paths if show(changed(plan, p)) == report]
    assert len(paths) > 150
    assert [path for path in untold if not ELSEWHERE.search(path)] == []


def test_figures_by_hand():
    text = ' '.join(show(sample_plan.plan()).split())
    for figure in (
        'fits on each device of v5p:8x8x8: 74.5 GiB of 95.7 GiB (77.8 %)',
        'predicted: 23.2 – 26.5 s a step',
        'tokens per second 316 – 362 k',  # 2,097,152 × 4 tokens in 26.54 and 23.18 s
        'of one chip 617 – 707',
        'MFU 59.8 – 68.4 %, full scores counted',
        'roofline 18.2 s',  # 8.36e15 / 459e12
        '64.0 – 73.2 days',  # 2e12 tokens are 238,419 steps
        '785,997 – 899,929',
        '3,301,188 – 3,779,704 at 4.2 a chip-hour',
        'Counted / closed form: 1.0024',
        'exposed collectives 1.13 s 1.24 s 4.9 % 4.7 %',
        '5.9 % off (median), 14.2 % at worst',
    ):
        assert figure in text


def test_the_ranking_is_explained():
    found = sample_plan.plan()['search']
    best, full, tensor, *_, large = (dict(candidate) for candidate in found)
    hbm = sample_plan.plan()['chip']['hbm_bytes']
    # Halfway between low and high: 1.075 × 4.7 s more products, computed twice; 0.5 s of kernels.
    assert ranking.why(full, best, hbm).startswith('+5.05 s matrix products, +500 ms Pallas')
    assert ranking.why(full, best, hbm).endswith('; 2.00 P FLOPs are computed twice')
    assert ranking.why(tensor, best, hbm).startswith('+5.17 s exposed collectives, +752 ms')
    assert ranking.why(large, best, hbm) == 'needs 57.3 GiB more than there are'
    assert ranking.why(found[0], found[0], hbm).startswith('best: 83.8 % matrix products, 4.6 %')
    # Twice the examples in twice the time are as fast.
    twice = {**best, 'batch': 2 * best['batch'], 'timeline': {
        end: {part: 2 * took for part, took in parts.items()}
        for end, parts in best['timeline'].items()
    }}  # fmt: skip
    assert ranking.why(twice, best, hbm) == 'as fast as the best one (same examples)'


def test_a_search_by_arithmetic_is_drawn_and_compared():
    plan = sample_plan.plan()
    for candidate in plan['search']:
        candidate['timeline'] = None
    best, second = plan['search'][:2]
    second |= {'batch': 1024, 'tokens_per_second': best['tokens_per_second'] / 2}
    bars = charts.charts(plan)['search'].bars
    assert [part.name for bar in bars for part in bar.parts] == ['closed form'] * 6
    assert bars[0].text == '24.6 s'  # √(23.18 × 26.06)
    assert bars[1].parts[0].value == pytest.approx(2 * (28.53 * 32.115) ** 0.5)
    reason = ranking.why(second, best, 0)
    assert reason.startswith('closed form: 2.00 times as long as the best one; 2.00 P FLOPs')


@pytest.mark.parametrize('name', PLANS)
def test_what_is_missing_is_not_made_up(tmp_path, name):
    whole = getattr(sample_plan, name)()
    needed = {'experiment', 'topology', 'chip', 'mesh'}
    poor = [{k: v for k, v in whole.items() if k != key} for key in whole.keys() - needed]
    poor += [{**whole, key: None} for key in whole.keys() - needed]
    poor.append({key: whole[key] for key in needed})
    for plan in poor:
        assert not re.search(r'\b(None|nan|inf|Undefined)\b', show(plan))
    text, _ = read(poor[-1], tmp_path)
    assert 'Not known whether it fits' in text
    assert 'none: nothing says how fast it is' in text
    assert 'No published step time' not in text
    assert 'no published step time of this kind is known' in text


def test_a_closed_form_says_so(tmp_path):
    plan = sample_plan.fast()
    _, page = read(plan, tmp_path)
    for text in (show(plan), ''.join(page.text)):
        assert 'closed form only: nothing was compiled' in text
        assert 'libtpu is missing' in text
        assert 'compiled by' not in text


def test_what_does_not_fit_has_ways_out_and_no_speed():
    text = ' '.join(show(sample_plan.too_large()).split())
    assert text.startswith('does not fit on each device of v5p:8x8x8: needs 153 GiB of 95.7 GiB')
    assert 'predicted step none: it does not fit' in text
    assert '--remat=full yes 41.2 GiB 28.5 – 32.1 s' in text
    assert 'tokens per second' not in text
    assert 'MFU 5' not in text


def test_peak_is_the_compilers_not_the_sum():
    plan = sample_plan.plan()
    plan['peak_bytes'] = 80 * 2**30
    [memory] = [section for section in sections(plan) if section.key == 'memory']
    [peak] = [row for row in memory.rows if row[0] == 'peak']
    assert peak == ('peak', '80.0 GiB', '65.7 GiB', '83.6 %')


def test_no_price_is_invented():
    plan = sample_plan.plan()
    del plan['training']['price'], plan['training']['price_per_chip_hour']
    assert 'not known: no price of a chip-hour was given' in show(plan)


def test_text_of_the_user_is_text(tmp_path):
    plan = sample_plan.plan()
    plan['knobs']['prompt'] = '<script>alert(1)</script>'
    _, page = read(plan, tmp_path)
    assert not page.all('script')
    assert '<script>alert(1)</script>' in ''.join(page.text)


def test_bars_are_true_to_scale():
    chart = charts.charts(sample_plan.plan())['memory']
    [hbm] = chart.marked()
    room = charts.WIDTH - chart.left - charts.RIGHT
    assert hbm[0] == chart.left + room  # nothing is larger
    for bar in chart.bars:
        pieces = chart.pieces(bar)
        for (left, width, *_), (after, *_) in itertools.pairwise(pieces):
            assert left + width == pytest.approx(after, abs=0.11)
        whole = sum(part.value for part in bar.parts)
        drawn = pieces[-1][0] + pieces[-1][1] - chart.left
        assert drawn == pytest.approx(room * whole / chart.largest, abs=0.11)
    assert [text for _, text in chart.ticks()] == [
        '0', '20.0 GiB', '40.0 GiB', '60.0 GiB', '80.0 GiB',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('value', 'text'),
    [(24.8, '24.8 s'), (1.0, '1.00 s'), (0.00124, '1.24 ms'), (3.1e-6, '3.10 µs'), (0.0, '0 s'),
     (2e-8, '20.0 ns'), (3725.0, '1:02:05'), (None, '–')],
)  # fmt: skip
def test_seconds(value, text):
    assert forms.seconds(value) == text


@pytest.mark.parametrize(
    ('ends', 'text'),
    [((23.18, 26.54), '23.2 – 26.5 s'), ((26.54, 23.18), '23.2 – 26.5 s'), ((2.0, 2.0), '2.00 s'),
     ((0.95, 1.05), '950 ms – 1.05 s')],
    ids=['range', 'turned', 'point', 'units'],
)  # fmt: skip
def test_between(ends, text):
    assert forms.between(ends, forms.seconds) == text


def test_what_is_exchanged_has_a_column_where_it_is_known():
    plan = sample_plan.plan()
    [found] = [section for section in sections(plan) if section.key == 'collectives']
    assert 'what' in found.head
    bare = [{**c, 'what': ''} for c in plan['collectives']]
    [found] = [s for s in sections({**plan, 'collectives': bare}) if s.key == 'collectives']
    assert 'what' not in found.head
    assert {len(row) for row in found.rows} == {len(found.head)}


def test_the_peak_of_quantized_products_is_named():
    plan = sample_plan.plan()
    assert 'the peak is that of bfloat16' not in show(plan)
    assert 'the peak is that of bfloat16' in show({**plan, 'knobs': {'matmul': 'int8'}})
