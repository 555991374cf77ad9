//! `strftime_now` of chat templates.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The present moment in the form that `format` asks for, in UTC (transformers takes local time).
///
/// # Errors
/// A directive other than `%Y %y %m %B %b %d %e %-d %j %A %a %H %I %M %S %p %F %T %%`.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(now, format).map_err(|directive| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("`strftime_now` does not know the directive `{directive}`"),
        )
    })
}

/// `seconds` since 1970 in the form `format`, or the directive that is not known.
fn strftime(seconds: u64, format: &str) -> Result<String, String> {
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[((days + 4) % 7) as usize];
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive: String = chars.next().into_iter().collect();
        if directive == "-" {
            directive.extend(chars.next());
        }
        out += &match directive.as_str() {
            "Y" => year.to_string(),
            "y" => format!("{:02}", year % 100),
            "m" => format!("{month:02}"),
            "-m" => month.to_string(),
            "B" => month_name.to_owned(),
            "b" => month_name[..3].to_owned(),
            "d" => format!("{day:02}"),
            "e" => format!("{day:2}"),
            "-d" => day.to_string(),
            "j" => format!("{:03}", day_of_year(year, month, day)),
            "A" => day_name.to_owned(),
            "a" => day_name[..3].to_owned(),
            "H" => format!("{hour:02}"),
            "I" => format!("{hour12:02}"),
            "M" => format!("{minute:02}"),
            "S" => format!("{second:02}"),
            "p" => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            "F" => format!("{year}-{month:02}-{day:02}"),
            "T" => format!("{hour:02}:{minute:02}:{second:02}"),
            "%" => "%".to_owned(),
            other => return Err(format!("%{other}")),
        };
    }
    Ok(out)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn month_len(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + is_leap(year) as u64,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn day_of_year(year: u64, month: u64, day: u64) -> u64 {
    (1..month).map(|m| month_len(year, m)).sum::<u64>() + day
}

/// Year, month and day of the Gregorian calendar from days since 1970.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    while days >= 365 + is_leap(year) as u64 {
        days -= 365 + is_leap(year) as u64;
        year += 1;
    }
    let mut month = 1;
    while days >= month_len(year, month) {
        days -= month_len(year, month);
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn known_moments() {
        assert_eq!(strftime(0, "%d %b %Y, %A").unwrap(), "01 Jan 1970, Thursday");
        // 29 February 2024, 23:59:58: 19782 days after 1970 began.
        let leap = 19_782 * 86_400 + 86_398;
        assert_eq!(
            strftime(leap, "%F %T %j %I%p %a %e %-d").unwrap(),
            "2024-02-29 23:59:58 060 11PM Thu 29 29"
        );
        assert_eq!(strftime(leap + 2, "%B %-d %y 100%%").unwrap(), "March 1 24 100%");
    }

    #[test]
    fn unknown_directives_are_named() {
        assert_eq!(strftime(0, "%Q").unwrap_err(), "%Q");
        assert_eq!(strftime(0, "%").unwrap_err(), "%");
    }
}
