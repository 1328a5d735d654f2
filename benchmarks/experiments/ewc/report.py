"""What the runs say: tables, figures, and a section of the page of results."""


def table(record):
    return ""


def figure(record):
    return b""


def tasks_figure(record):
    return b""
