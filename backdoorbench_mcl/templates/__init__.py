"""What `bbmcl new` copies: one working method of each kind, and the files of a package around it.

The modules are real code under the same tests as any method; `mymethod` and `MyMethod` become the author's names.
"""
