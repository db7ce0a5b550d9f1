"""Tables and figures of finished runs. Example::

from treelora_avalanche.reports.figures import write_figures
from treelora_avalanche.reports.table import write_table

write_table(results, folder)  # table.md, comparison.json
write_figures(results, folder / "figures")
"""
