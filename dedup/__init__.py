"""Finding copies, in the order of the work:

    describing   embed, describe; descriptors: sscd, clip, unit_vectors; against
    who is who   rules, corpus, pictures: exact, keepers (the declared order)
    searching    near_duplicates, search_stages: clusters, search, second_look, graph
    measuring    truth, recall
    the outcome  removals: keepers; outcome_stages, report; show, contact_sheet

`deduplicate` is the command and tells the story; `records` has the tables, `steps` runs a step.
"""
