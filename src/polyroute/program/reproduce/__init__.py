"""The experiments of the paper from beginning to end, as presets in the folder `presets`.

A preset says what is trained and adapted on what; each of its stages is a polyroute command with a
folder of its own, so a stage that is done is not done again, and the results are always made from
what lies in these folders.
"""
