"""The way in: memory hand-offs, files, watched trees and the control verbs, all through one door (admit)."""
