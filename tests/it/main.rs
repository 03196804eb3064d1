//! All tests that need real servers, one module for each subject.

mod store;
