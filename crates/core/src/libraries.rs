//! Members whose libraries differ: text is sorted, and geometry computed, by libraries outside PostgreSQL.

use std::collections::BTreeMap;

/// Versions by name, as [`NAMES`] has them. Empty while they are not known (and from an older agent).
pub type Libraries = BTreeMap<String, String>;

/// Every name, with what people call it.
pub const NAMES: [(&str, &str); 6] = [
    ("postgresql", "PostgreSQL"),
    ("libc", "libc's collations"),
    ("icu", "ICU's collations"),
    ("postgis", "PostGIS"),
    ("geos", "GEOS"),
    ("proj", "PROJ"),
];

/// Where two members differ, in words from the side of the first: "GEOS 3.11.1 (3.12.2 there)". None where one of
/// them is not known yet.
pub fn differences(here: &Libraries, there: &Libraries) -> Vec<String> {
    if here.is_empty() || there.is_empty() {
        return Vec::new();
    }
    let version = |of: &Libraries, name: &str| of.get(name).cloned().unwrap_or("none".to_owned());
    NAMES
        .iter()
        .filter(|(name, _)| here.get(*name) != there.get(*name))
        .map(|(name, called)| {
            format!(
                "{called} {} ({} there)",
                version(here, name),
                version(there, name)
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn libraries(pairs: &[(&str, &str)]) -> Libraries {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn differences_are_named_and_the_unknown_is_none() {
        let a = libraries(&[
            ("postgresql", "15.14"),
            ("libc", "2.36"),
            ("geos", "3.11.1"),
        ]);
        let b = libraries(&[("postgresql", "15.14"), ("libc", "2.41")]);
        assert_eq!(differences(&a, &a), Vec::<String>::new());
        assert_eq!(
            differences(&a, &b),
            [
                "libc's collations 2.36 (2.41 there)",
                "GEOS 3.11.1 (none there)"
            ]
        );
        assert_eq!(differences(&a, &Libraries::new()), Vec::<String>::new());
    }
}
