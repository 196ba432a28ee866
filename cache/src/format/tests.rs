//! Goal: every structure reads back as written, and no bytes whatever panic. Method: property tests and goldens.
