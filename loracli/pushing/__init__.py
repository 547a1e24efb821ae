"""The only room that writes to the Hub: an export that was verified in, one commit that was looked at again out.

directory ──verify──> contents ──one commit on what was looked at──> repository ──list──> the same hashes, or 7
"""
