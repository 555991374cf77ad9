//! Gate estimators and the reports that say how good they are

#![forbid(unsafe_code)]
