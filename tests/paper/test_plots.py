"""Figures do not depend on what the user's matplotlib is set to."""

from matplotlib import rc_context

from ppsr.paper.plots import share_by_data_set


def test_the_users_settings_change_nothing(tmp_path):
    records = {'Set5': [{'pure': 0.1}, {'pure': 0.4}, {'pure': 0.7}]}
    share_by_data_set(tmp_path / 'plain', 2, records)
    with rc_context({'figure.facecolor': 'black', 'xtick.color': 'red', 'boxplot.boxprops.linewidth': 9}):
        share_by_data_set(tmp_path / 'own', 2, records)
    for suffix in ('.png', '.pdf'):
        assert (tmp_path / f'plain{suffix}').read_bytes() == (tmp_path / f'own{suffix}').read_bytes()
