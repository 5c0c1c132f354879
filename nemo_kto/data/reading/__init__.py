"""Files -> records.

Imports no torch and nothing of the other two parts of `data`. Start with `records.py`, what everything is read into,
and `formats.py`, the table of what people have.

    sources, parts, containers, data_sets, json_array
                                              what a user names -> rows
    settling, row_reader, chunks              how a file is read, told once by its first rows; rows -> records
    columns, paths, json_strings, labels      a row seen through names of our own, and what is in its cells
    formats, answers, exports                 the formats, and what each makes of a row: prompts with a rated answer
    conversations, spellings                  what makes them valid, and how others write messages
    image_places, images                      where in a prompt images stand, and what they are
"""
