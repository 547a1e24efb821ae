"""Whether servers take an adapter and mean the same by it.

    directory --read leniently--> AdapterFiles      rules/*.toml --> Server, Rule
    rule + AdapterFiles (+ base) --checks.py--> what is found --lint.py--> a report and a command for each server

What a server accepts is data: one file a server in `rules/`, with the versions it holds for and where it was read.
"""
