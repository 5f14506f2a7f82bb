"""The report page: `page.write_report(runs, out)`. What reads runs is light: a sweep asks for it again and again."""
