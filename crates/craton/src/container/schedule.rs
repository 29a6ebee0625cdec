//! `BACKUP_SCHEDULE`: a cron expression of five fields, in UTC.

use jiff::civil::DateTime;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

/// No expression waits longer for its next minute: the 29th of February comes within eight years.
const DAYS_MAX: i64 = 8 * 366 + 1;

/// When something is due.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    minutes: Vec<bool>,
    hours: Vec<bool>,
    days: Vec<bool>,
    months: Vec<bool>,
    weekdays: Vec<bool>,
    /// Of day and weekday, both restricted, either counts (crontab(5)).
    either_day: bool,
}

const MONTHS: [&str; 12] = [
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

impl Schedule {
    /// Reads `minute hour day month weekday`, or `@hourly` and the like.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = match text.trim() {
            "@hourly" => "0 * * * *",
            "@daily" | "@midnight" => "0 0 * * *",
            "@weekly" => "0 0 * * 0",
            "@monthly" => "0 0 1 * *",
            "@yearly" | "@annually" => "0 0 1 1 *",
            other => other,
        };
        let wrong = |why: String| format!("the schedule \"{text}\" cannot be understood: {why}");
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(wrong(format!(
                "it has {} fields, not five (minute hour day month weekday)",
                fields.len()
            )));
        };
        let mut weekdays = field(weekday, 0, 7, &WEEKDAYS).map_err(wrong)?;
        // Both 0 and 7 are Sunday.
        if let Some(true) = weekdays.pop()
            && let Some(sunday) = weekdays.first_mut()
        {
            *sunday = true;
        }
        let schedule = Self {
            minutes: field(minute, 0, 59, &[]).map_err(wrong)?,
            hours: field(hour, 0, 23, &[]).map_err(wrong)?,
            days: field(day, 1, 31, &[]).map_err(wrong)?,
            months: field(month, 1, 12, &MONTHS).map_err(wrong)?,
            weekdays,
            either_day: !day.starts_with('*') && !weekday.starts_with('*'),
        };
        if schedule.next(Timestamp::UNIX_EPOCH).is_none() {
            return Err(wrong("there is no such day".to_owned()));
        }
        Ok(schedule)
    }

    /// The first minute after `now`.
    pub fn next(&self, now: Timestamp) -> Option<Timestamp> {
        let zone = TimeZone::UTC;
        let from = now.checked_add(SignedDuration::from_secs(60)).ok()?;
        let mut at: DateTime = from.to_zoned(zone.clone()).datetime();
        at = at.with().second(0).subsec_nanosecond(0).build().ok()?;
        let last = at
            .checked_add(SignedDuration::from_hours(24 * DAYS_MAX))
            .ok()?;
        while at <= last {
            let skip = if !self.on_day(at) {
                let midnight = at.with().hour(0).minute(0).build().ok()?;
                at = midnight.checked_add(SignedDuration::from_hours(24)).ok()?;
                continue;
            } else if !has(&self.hours, at.hour()) {
                SignedDuration::from_mins(60 - i64::from(at.minute()))
            } else if !has(&self.minutes, at.minute()) {
                SignedDuration::from_mins(1)
            } else {
                return at.to_zoned(zone).ok().map(|z| z.timestamp());
            };
            at = at.checked_add(skip).ok()?;
        }
        None
    }

    fn on_day(&self, at: DateTime) -> bool {
        let weekday = at.date().weekday().to_sunday_zero_offset();
        let (day, weekday) = (has(&self.days, at.day() - 1), has(&self.weekdays, weekday));
        let fits = if self.either_day {
            day || weekday
        } else {
            day && weekday
        };
        fits && has(&self.months, at.month() - 1)
    }
}

fn has(set: &[bool], index: i8) -> bool {
    usize::try_from(index).is_ok_and(|i| set.get(i) == Some(&true))
}

/// `*`, numbers, names, ranges, steps, and lists of these. The first place stands for `least`.
fn field(text: &str, least: usize, most: usize, names: &[&str]) -> Result<Vec<bool>, String> {
    let mut set = vec![false; most - least + 1];
    for part in text.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(step)),
            None => (part, None),
        };
        let step = match step.map(str::parse::<usize>) {
            None => 1,
            Some(Ok(step)) if step > 0 => step,
            Some(_) => return Err(format!("\"{part}\" has no step above 0")),
        };
        let (from, to) = if range == "*" {
            (least, most)
        } else {
            let (from, to) = match range.split_once('-') {
                Some((from, to)) => (value(from, least, names)?, value(to, least, names)?),
                None if part.contains('/') => (value(range, least, names)?, most),
                None => {
                    let one = value(range, least, names)?;
                    (one, one)
                }
            };
            if from < least || to > most || from > to {
                return Err(format!("\"{part}\" is not within {least} to {most}"));
            }
            (from, to)
        };
        for n in (from..=to).step_by(step) {
            if let Some(place) = set.get_mut(n - least) {
                *place = true;
            }
        }
    }
    Ok(set)
}

fn value(text: &str, least: usize, names: &[&str]) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    if let Some(index) = names.iter().position(|n| *n == lower) {
        return Ok(index + least);
    }
    text.parse().map_err(|_| format!("\"{text}\" is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(expression: &str, now: &str) -> String {
        let schedule = Schedule::parse(expression).unwrap();
        schedule.next(now.parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn next_minutes() {
        for (expression, now, then) in [
            ("0 0 * * *", "2026-11-27T00:00:00Z", "2026-11-28T00:00:00Z"),
            ("0 0 * * *", "2026-11-27T23:59:59Z", "2026-11-28T00:00:00Z"),
            (
                "*/30 */5 * * *",
                "2026-11-27T20:30:01Z",
                "2026-11-28T00:00:00Z",
            ),
            (
                "*/30 */5 * * *",
                "2026-11-27T20:10:00Z",
                "2026-11-27T20:30:00Z",
            ),
            (
                "15,45 3-4 * * *",
                "2026-11-27T03:15:00Z",
                "2026-11-27T03:45:00Z",
            ),
            (
                "0 12 29 2 *",
                "2026-01-01T00:00:00Z",
                "2028-02-29T12:00:00Z",
            ),
            (
                "0 0 1 * MON",
                "2026-11-27T00:00:00Z",
                "2026-11-30T00:00:00Z",
            ),
            ("0 0 * * 7", "2026-11-27T00:00:00Z", "2026-11-29T00:00:00Z"),
            ("@hourly", "2026-12-31T23:30:00Z", "2027-01-01T00:00:00Z"),
            (
                "0 0 1 JAN *",
                "2026-11-27T00:00:00Z",
                "2027-01-01T00:00:00Z",
            ),
        ] {
            assert_eq!(next(expression, now), then, "{expression} after {now}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_said() {
        for wrong in [
            "",
            "* * * *",
            "60 * * * *",
            "* * 0 * *",
            "*/0 * * * *",
            "5-1 * * * *",
            "x * * * *",
            "0 0 31 2 *",
            "* * * * 8",
            "* * * 13 *",
        ] {
            let error = Schedule::parse(wrong).unwrap_err();
            assert!(error.contains("cannot be understood"), "{wrong}: {error}");
        }
    }
}
